// Package service is kvcachedd without its command line: budgets of device memory, handed out over a unix socket (Linux).
//
//	service   the methods of the contract, on the ledgers           New, Service
//	leases    budgets, and who holds them
//	stats     what is charged, and streams of it
//	server    gRPC and JSON on one socket, within bounds            NewServer, Server.Serve
//	peer      who is at the other end of a connection               Policy
//	listen    the socket: made here, or handed over by systemd      Listen, Activated
//
// A budget is a lease in a ledger of libkvcached, which all processes that map device memory keep to. Its holder is the
// connection that it was asked for on: the kernel ends that with the process, in whatever container it is, and so with
// every descriptor of it the budget ends. Should the service itself die, the kernel drops the locks that its leases are.
package service
