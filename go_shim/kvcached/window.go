package kvcached

// Shifts says whether llama.cpp can shift this context, as far as sliding windows have a say in it: the cache of the windows
// must be as long as the other one (llama_kv_cache_iswa::get_can_shift). It is in a context that is no longer than the
// windows and one physical batch.
func (s Shape) Shifts() bool {
	model, caches, _ := s.caches()
	var window uint64
	if model != nil {
		window = model.window
	} else {
		// which layers have it cannot be told
		window = openKeys(s.Metadata).get("attention.sliding_window", 0)
	}
	return window == 0 || s.Context.SWAFull || ringCells(window, caches.Sequence, s.Context, caches.Ubatch) == caches.Sequence
}
