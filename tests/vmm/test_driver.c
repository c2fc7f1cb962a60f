/*
 * Loading the CUDA driver and opening a device, with the fake one (fake_cuda.c) whatever the machine has.
 * Each case is a process of its own, because a driver is loaded once: this program again, as probe.c.
 */
#include "support.h"

#include "cuda_driver.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* The folder of the fake driver: beside that of this program, or where KVCACHED_FAKE_DRIVER says. */
static const char *fake_folder(void) {
  static char path[600];
  const char *given = getenv("KVCACHED_FAKE_DRIVER");
  if (given) return given;
  ssize_t n = readlink("/proc/self/exe", path, sizeof(path) - 40);
  CHECK(n > 0);
  path[n] = 0;
  for (int up = 0; up < 2; up++) *strrchr(path, '/') = 0;
  strcat(path, "/fake");
  return path;
}

static char answer[4000];
static int out_fd, in_fd;

/* settings: "NAME=value NAME=value ..." on top of the fake driver's defaults. */
static pid_t start_probe(const char *what, const char *settings, const char *folder) {
  int in[2], out[2];
  CHECK(pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0);
  fflush(stdout);
  pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    for (char **e = environ; *e;) { /* settings of the tests around this one */
      char name[64];
      if (sscanf(*e, "%63[A-Z_]", name) == 1 && strncmp(name, "FAKE_", 5) == 0) {
        unsetenv(name);
        e = environ;
      } else {
        e++;
      }
    }
    setenv("FAKE_CUDA_STRICT", "1", 1);
    setenv("LD_LIBRARY_PATH", folder, 1);
    setenv("KVCACHED_PROBE", what, 1);
    char *copy = strdup(settings), *rest = copy;
    for (char *one; copy && (one = strsep(&rest, " "));) {
      char *value = strchr(one, '=');
      if (!value) continue;
      *value = 0;
      setenv(one, value + 1, 1);
    }
    dup2(in[0], 0);
    dup2(out[1], 1);
    execl("/proc/self/exe", "probe", (char *)NULL);
    _exit(127);
  }
  close(in[0]);
  close(out[1]);
  in_fd = in[1];
  out_fd = out[0];
  return pid;
}

static int end_probe(pid_t pid) {
  size_t n = 0;
  close(in_fd);
  for (ssize_t got; n + 1 < sizeof(answer);) {
    got = read(out_fd, answer + n, sizeof(answer) - 1 - n);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    n += (size_t)got;
  }
  answer[n] = 0;
  close(out_fd);
  int status;
  CHECK(waitpid(pid, &status, 0) == pid);
  CHECK(WIFEXITED(status));
  return WEXITSTATUS(status);
}

static int ask(const char *what, const char *settings) {
  return end_probe(start_probe(what, settings, fake_folder()));
}

static void answer_has(const char *text) {
  if (!strstr(answer, text)) check_failed(__FILE__, __LINE__, "\"%s\" does not say \"%s\"", answer, text);
}

/* Asks for a device; the answer begins with `first` and holds `also`. */
static void expect(const char *settings, const char *first, const char *also) {
  CHECK_EQ(ask("open", settings), 0);
  if (strncmp(answer, first, strlen(first)) != 0)
    check_failed(__FILE__, __LINE__, "with %s: \"%s\" does not begin with \"%s\"", settings, answer, first);
  answer_has(also);
}

TEST_HOST(driver, opens) {
  CHECK(access(fake_folder(), X_OK) == 0); /* make builds it: <build>/fake/libcuda.so.1 */
  expect("", "OK name=Fake GPU 0 id=0001", "granularity=2097152 page=2097152 large=67108864 edits=1");
  answer_has("id=00011223-3445-5667-7889-9aabbccdde02 ");
}

/* Nothing but text where the driver should be: found first, and not a library. */
TEST_HOST(driver, no_driver) {
  const char *folder = scratch("not-a-driver");
  char path[600];
  CHECK(mkdir(folder, 0700) == 0);
  snprintf(path, sizeof(path), "%s/libcuda.so.1", folder);
  FILE *f = fopen(path, "w");
  CHECK(f != NULL);
  fputs("not a library\n", f);
  fclose(f);
  pid_t pid = start_probe("open", "", folder);
  CHECK_EQ(end_probe(pid), 0);
  CHECK(unlink(path) == 0);
  answer_has("KVCACHED_E_UNSUPPORTED no CUDA driver: ");
  answer_has("libcuda.so.1");
}

TEST_HOST(driver, missing_entry_points) {
  expect("FAKE_CUDA_MISSING=cuMemMap", "KVCACHED_E_UNSUPPORTED", "entry points, 1 in all: cuMemMap;");
  expect("FAKE_CUDA_MISSING=cuMemSetAccess,cuMemAddressReserve,cuGetErrorName", "KVCACHED_E_UNSUPPORTED",
         "3 in all: cuGetErrorName, cuMemAddressReserve, cuMemSetAccess;");

  static char all[2000] = "FAKE_CUDA_MISSING=cuDeviceGetUuid_v2,cuDeviceGetUuid";
  int n = 1;
#define XX(member, symbol, parameters) strcat(all, "," #symbol), n++;
  KVC_CUDA_ENTRIES(XX)
#undef XX
  char count[40];
  snprintf(count, sizeof(count), ", %d in all: ", n);
  expect(all, "KVCACHED_E_UNSUPPORTED", count);
#define XX(member, symbol, parameters) answer_has(#symbol);
  KVC_CUDA_ENTRIES(XX)
#undef XX
  answer_has("cuDeviceGetUuid;");
}

/* Drivers before 11.4 have the older one only. */
TEST_HOST(driver, older_uuid) {
  expect("FAKE_CUDA_MISSING=cuDeviceGetUuid_v2", "OK", "id=00011223-3445-5667-7889-9aabbccdde01 ");
  expect("FAKE_CUDA_MISSING=cuDeviceGetUuid", "OK", "id=00011223-3445-5667-7889-9aabbccdde02 ");
}

TEST_HOST(driver, refuses_to_start) {
  expect("FAKE_CUDA_DEVICES=0", "KVCACHED_E_UNSUPPORTED", "CUDA_ERROR_NO_DEVICE (100): no CUDA-capable");
  expect("FAKE_CUDA_INIT=34", "KVCACHED_E_UNSUPPORTED", "CUDA_ERROR_STUB_LIBRARY (34)");
  answer_has("stub was found in place of the driver");
  expect("FAKE_CUDA_INIT=803", "KVCACHED_E_UNSUPPORTED", "one version");
  expect("FAKE_CUDA_INIT=3", "KVCACHED_E_DEVICE", "CUDA_ERROR_NOT_INITIALIZED (3)");
  expect("FAKE_CUDA_INIT=2", "KVCACHED_E_NOMEM", "CUDA_ERROR_OUT_OF_MEMORY (2)");
  expect("FAKE_CUDA_INIT=12345", "KVCACHED_E_DEVICE", "unknown to the driver (12345): no description");
}

TEST_HOST(driver, no_virtual_memory_management) {
  expect("FAKE_CUDA_NO_VMM=1", "KVCACHED_E_UNSUPPORTED", "Fake GPU 0 has no virtual memory management");
}

TEST_HOST(driver, devices_by_number) {
  expect("PROBE_DEVICE=1", "KVCACHED_E_UNSUPPORTED", "no CUDA device 1: this process sees 1");
  expect("PROBE_DEVICE=-1", "KVCACHED_E_INVAL", "device -1");
  expect("PROBE_DEVICE=2 FAKE_CUDA_DEVICES=3", "OK name=Fake GPU 2 id=0201", "");
}

TEST_HOST(driver, devices_by_pci_bus_id) {
  static const char *const forms[] = {"0000:1c:00.0", "00000000:1C:00.0", "1c:00.0", "0:1c:0.0"};
  static const char *const bad[] = {"",          "GPU-1",       "1c", "0000:1c:00", "0000:1c:00.0x",
                                    "1c:00.0.0", "0000:zz:00.0"};
  char settings[100];
  for (size_t i = 0; i < sizeof(forms) / sizeof(*forms); i++) {
    snprintf(settings, sizeof(settings), "FAKE_CUDA_DEVICES=2 PROBE_PCI=%s", forms[i]);
    expect(settings, "OK name=Fake GPU 1", "id=0101");
  }
  for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
    snprintf(settings, sizeof(settings), "PROBE_PCI=%s", bad[i]);
    expect(settings, "KVCACHED_E_INVAL pci_bus_id \"", "0000:1b:00.0");
  }
  expect("PROBE_PCI=0000:1c:00.0", "KVCACHED_E_UNSUPPORTED", "no CUDA device at PCI bus id 0000:1c:00.0");
  answer_has("among the 1 that");
}

TEST_HOST(driver, page_sizes) {
  expect("FAKE_CUDA_GRANULARITY=4194304", "OK", "granularity=4194304 page=4194304 large=67108864");
  expect("FAKE_CUDA_GRANULARITY=65536", "OK", "granularity=65536 page=2097152 large=67108864");
  expect("PROBE_PAGE=4194304 PROBE_LARGE=33554432", "OK", "page=4194304 large=33554432");
  expect("PROBE_PAGE=6291456", "OK", "page=6291456 large=62914560"); /* ten of them */
  expect("PROBE_PAGE=134217728", "OK", "page=134217728 large=134217728");
  expect("PROBE_PAGE=3145728", "KVCACHED_E_INVAL page_size 3145728", "granularity, 2097152");
  expect("PROBE_LARGE=3145728", "KVCACHED_E_INVAL large_page 3145728", "page_size (2097152 bytes)");
  expect("PROBE_LARGE=270532608", "KVCACHED_E_INVAL large_page", "up to 268435456");
  expect("PROBE_LARGE=2097152", "OK", "large=2097152");
}

/* Where mappings may change under running kernels is known of Hopper and later. */
TEST_HOST(driver, capabilities) {
  expect("FAKE_CUDA_CAPABILITY=7.5", "OK", "edits=0");
  expect("FAKE_CUDA_CAPABILITY=8.9", "OK", "edits=0");
  expect("FAKE_CUDA_CAPABILITY=9.0", "OK", "edits=1");
  expect("FAKE_CUDA_CAPABILITY=10.3", "OK", "edits=1");
}

TEST_HOST(driver, leaves_the_current_context) {
  CHECK_EQ(ask("contexts", ""), 0);
  CHECK_TEXT(answer, "OK\n");
}

TEST_HOST(driver, one_call_an_operation) {
  CHECK_EQ(ask("calls", ""), 0);
  CHECK_TEXT(answer, "OK\n");
}

TEST_HOST(driver, loaded_by_many_threads) {
  CHECK_EQ(ask("threads", "FAKE_CUDA_GRANULARITY=65536 PROBE_PAGE=65536"), 0);
  CHECK_TEXT(answer, "OK\n");
}

TEST_HOST(driver, forked_child) {
  CHECK_EQ(ask("fork", ""), 0);
  answer_has("KVCACHED_E_DEVICE");
  answer_has("CUDA_ERROR_NOT_INITIALIZED (3)");
  answer_has("exec");
}

TEST_HOST(driver, queued_work) {
  CHECK_EQ(ask("streams", "FAKE_CUDA_ASYNC=1"), 99); /* what was lost is told */
  answer_has("KVCACHED_E_DEVICE");
  answer_has("CUDA_ERROR_ILLEGAL_ADDRESS (700)");
  answer_has("started anew");
}

TEST_HOST(driver, pinned_memory) {
  CHECK_EQ(ask("pinned", ""), 0);
  CHECK_TEXT(answer, "OK pinned=1 slow=0\n");
  CHECK_EQ(ask("pinned", "FAKE_CUDA_NO_PINNED=1"), 0);
  CHECK_TEXT(answer, "OK pinned=0 slow=0\n");
  CHECK_EQ(ask("pinned", "FAKE_CUDA_SLOW_HOST_MS=60"), 0);
  CHECK_TEXT(answer, "OK pinned=1 slow=1\n");
}

/* NVML, with the fake one as well. */
TEST_HOST(driver, what_is_held_beside) {
  const char *twice = "KVCACHED_OK 314572800\nKVCACHED_OK 314572800\n";
#define NVML "KVCACHED_TEST_NVML=libnvidia-ml.so.1 FAKE_NVML_BESIDE=314572800"
  CHECK_EQ(ask("beside", NVML), 0);
  CHECK_TEXT(answer, twice);
  CHECK_EQ(ask("beside", NVML " FAKE_NVML_OTHERS=200"), 0); /* a list that does not fit at first */
  CHECK_TEXT(answer, twice);
  /* By the difference that making the context made, where the process is not told from others. */
  CHECK_EQ(ask("beside", NVML " FAKE_NVML_NO_PID=1"), 0);
  CHECK_TEXT(answer, twice);
  CHECK_EQ(ask("beside", NVML " FAKE_NVML_NO_PID=1 FAKE_NVML_BESIDE=0"), 0);
  answer_has("KVCACHED_E_UNSUPPORTED 0NVML does not know this process among 1");
  CHECK_EQ(ask("beside", "KVCACHED_TEST_NVML=libno-such-library.so.1"), 0);
  answer_has("KVCACHED_E_UNSUPPORTED 0no NVML: libno-such-library.so.1");
#undef NVML
}

/* The fake itself: what is left behind is told, and its card is one for all processes. */
TEST_HOST(driver, fake_tells_leaks) {
  CHECK_EQ(ask("leak", ""), 99);
  CHECK_EQ(ask("open", ""), 0);
}

static void hears(int fd, const char *line) {
  char got[80] = "";
  CHECK(read(fd, got, sizeof(got) - 1) > 0);
  CHECK_TEXT(got, line);
}

TEST_HOST(driver, fake_card_is_shared) {
  char settings[600], small[600];
  const char *card = scratch("card");
  snprintf(settings, sizeof(settings), "FAKE_CUDA_STATE=%s FAKE_CUDA_MEMORY=67108864 PROBE_HOLD=41943040",
           card);
  snprintf(small, sizeof(small), "FAKE_CUDA_STATE=%s FAKE_CUDA_MEMORY=67108864 PROBE_HOLD=2097152", card);
  pid_t holder = start_probe("hold", settings, fake_folder());
  int holder_in = in_fd, holder_out = out_fd;
  hears(holder_out, "KVCACHED_OK 25165824 of 67108864\n");
  CHECK_EQ(ask("hold", settings), 0);
  CHECK_TEXT(answer, "KVCACHED_E_NOMEM 25165824 of 67108864\n");
  pid_t other = start_probe("hold", small, fake_folder());
  hears(out_fd, "KVCACHED_OK 23068672 of 67108864\n");
  CHECK(kill(holder, SIGKILL) == 0); /* and what it had is free again */
  int status;
  CHECK(waitpid(holder, &status, 0) == holder);
  close(holder_in);
  close(holder_out);
  CHECK(write(in_fd, "?", 1) == 1);
  hears(out_fd, "KVCACHED_OK 65011712 of 67108864\n");
  CHECK_EQ(end_probe(other), 0);
  CHECK_EQ(ask("hold", settings), 0);
  CHECK_TEXT(answer, "KVCACHED_OK 25165824 of 67108864\n");
}
