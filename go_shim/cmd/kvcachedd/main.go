// Command kvcachedd hands out budgets of device memory to the programs of one machine, and sets the limit that they share.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"kvpatch.dev/shim/kvcached"
	"kvpatch.dev/shim/service"
)

// version is set by the linker.
var version = "unknown"

// errUsage: what is wrong has been said.
var errUsage = errors.New("usage")

type options struct {
	socket, group, library, ledger string
	limit                          uint64
	devices                        []string
}

func main() {
	err := run(os.Args[1:])
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, "kvcachedd:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	o, err := parse(args)
	if err != nil || o == nil {
		return err
	}
	group, err := service.GroupID(o.group)
	if err != nil {
		return fmt.Errorf("--group: %w", err)
	}
	library, err := kvcached.OpenLibrary(o.directories())
	if errors.Is(err, kvcached.ErrUnsupported) {
		return errors.New("this binary was built without the glue to libkvcached: build it by `kvpatch build --ollama`, with cgo")
	} else if err != nil {
		return err
	}
	devices, err := o.resolve(library)
	if err != nil {
		return err
	}
	listener, how, err := o.listen(group)
	if err != nil {
		return err
	}
	defer listener.Close()
	budgets, err := service.New(library, devices)
	if err != nil {
		return err
	}
	server := service.NewServer(budgets, service.NewPolicy(group))

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	slog.Info("serving", "socket", listener.Addr(), "socket_from", how, "group", o.group, "version", version, "library", library.Version())
	if err := service.Ready(); err != nil {
		slog.Warn("systemd could not be told that the service is ready", "error", err)
	}
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
		slog.Info("ending: budgets lapse, limits stay in the ledgers")
		server.Close()
		return <-served
	}
}

// parse reads the command line; nil without an error: there is nothing to do any more.
func parse(args []string) (*options, error) {
	o := &options{limit: kvcached.NoLimit}
	flags := flag.NewFlagSet("kvcachedd", flag.ContinueOnError)
	flags.StringVar(&o.socket, "socket", os.Getenv(kvcached.SocketVariable), "`path` of the unix socket to serve; by default that of "+kvcached.SocketVariable+"; not with a socket from systemd")
	flags.StringVar(&o.group, "group", os.Getenv(kvcached.SystemGroupVariable), "system `group` whose members may connect; by default that of "+kvcached.SystemGroupVariable+", else nobody but this user and root")
	flags.StringVar(&o.library, "library", "", "`folder` of "+kvcached.LibraryName+"; by default looked for beside this program, and in ../lib/ollama")
	flags.StringVar(&o.ledger, "ledger", os.Getenv(kvcached.LedgerVariable), "`path` of host memory's ledger, and with .<bus id> of a GPU's; by default that of "+kvcached.LedgerVariable+", else the user's own")
	flags.Func("limit", "what all programs may have together on each device, such as `20GB`; by default the limit in the ledger is left as it is", func(text string) (err error) {
		o.limit, err = kvcached.ParseSize(text, "")
		return err
	})
	flags.Func("device", "`device` to serve: host, or a GPU by its bus id or UUID; may be repeated; by default every NVIDIA GPU, and host memory where there is none", func(text string) error {
		o.devices = append(o.devices, text)
		return nil
	})
	show := flags.Bool("version", false, "show the version")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, err
		}
		return nil, errUsage
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "kvcachedd: %q: there are options alone; --help lists them\n", flags.Arg(0))
		return nil, errUsage
	}
	if *show {
		fmt.Println("kvcachedd", version)
		return nil, nil
	}
	return o, nil
}

// listen takes the socket handed over, else makes one.
func (o *options) listen(group int) (*net.UnixListener, string, error) {
	listener, err := service.Activated()
	if err != nil || listener != nil {
		return listener, "LISTEN_FDS", err
	}
	if !filepath.IsAbs(o.socket) {
		return nil, "", fmt.Errorf("--socket %q: name the absolute path of the socket to serve, such as /run/kvcachedd/kvcachedd.sock (or set %s)", o.socket, kvcached.SocketVariable)
	}
	listener, err = service.Listen(o.socket, group)
	return listener, "this program", err
}

// directories are those that may have the library: the one named alone, else those of a build's layout.
func (o *options) directories() []string {
	if o.library != "" {
		return []string{strings.TrimSuffix(o.library, "/"+kvcached.LibraryName)}
	}
	program, err := os.Executable()
	if err != nil {
		return nil
	}
	if real, err := filepath.EvalSymlinks(program); err == nil {
		program = real
	}
	folder := filepath.Dir(program)
	return []string{filepath.Join(folder, "..", "lib", "ollama"), folder, filepath.Join(folder, "lib", "ollama")}
}

// resolve says which ledgers are meant.
func (o *options) resolve(library kvcached.Library) ([]service.Device, error) {
	gpus := kvcached.GPUs()
	var found []service.Device
	if len(o.devices) == 0 {
		for _, gpu := range gpus {
			o.devices = append(o.devices, gpu.BusID)
		}
		if len(gpus) == 0 {
			o.devices = []string{kvcached.HostID}
		}
	}
	for _, name := range o.devices {
		if name == kvcached.HostID {
			found = append(found, service.Device{ID: name, Path: o.ledger, Limit: o.limit})
			continue
		}
		gpu, err := pick(gpus, name)
		if err != nil {
			return nil, err
		}
		path := ""
		if o.ledger != "" && gpu.BusID != "" {
			path = o.ledger + "." + gpu.BusID
		} else if path, err = library.LedgerPath(gpu.UUID); err != nil {
			return nil, fmt.Errorf("--device %s: %w", name, err)
		}
		id := gpu.BusID
		if id == "" {
			id = gpu.UUID
		}
		found = append(found, service.Device{ID: id, Path: path, Limit: o.limit})
	}
	return found, nil
}

// pick finds a GPU by its bus id or UUID. A UUID that the driver does not show (a MIG instance's) is taken as it is.
func pick(gpus []kvcached.GPU, name string) (kvcached.GPU, error) {
	var there []string
	for _, gpu := range gpus {
		if strings.EqualFold(gpu.UUID, name) || gpu.BusID == kvcached.BusID(name) {
			return gpu, nil
		}
		there = append(there, gpu.BusID)
	}
	if upper := strings.ToUpper(name); strings.HasPrefix(upper, "GPU-") || strings.HasPrefix(upper, "MIG-") {
		return kvcached.GPU{UUID: name}, nil
	}
	return kvcached.GPU{}, fmt.Errorf("--device %s: it is neither %s, a UUID, nor the bus id of a GPU of this machine (%s)", name, kvcached.HostID, strings.Join(there, ", "))
}
