package api

// KVCachedStatus is the elastic memory of a loaded model in [ProcessModelResponse]. Sizes are bytes.
type KVCachedStatus struct {
	// State is "leased" (memory is set aside, the runner maps none of its own yet), "loading", "awake", "sleeping" (on its
	// way to sleep), "asleep", "waking" (or waiting for its turn to), or "unmanaged" (the model's runner does not use
	// elastic memory; all sizes are zero).
	State         string `json:"state"`
	KVMapped      uint64 `json:"kv_mapped"`      // KV cache that is there
	KVReserved    uint64 `json:"kv_reserved"`    // KV cache that could be
	WeightsMapped uint64 `json:"weights_mapped"` // weights that are there, but for those held outside the library
	ContextBytes  uint64 `json:"context_bytes"`  // of the process itself on its GPUs
	HostBytes     uint64 `json:"host_bytes"`     // host memory with what sleeps
	Lease         uint64 `json:"lease"`          // set aside before the runner was started
	Charge        uint64 `json:"charge"`         // counted against the limit

	// Limit is what all models together may be charged on a device; null for no limit.
	Limit *uint64 `json:"limit"`
}
