package kvcached

// Shown is a setting as `ollama serve` shows it.
type Shown struct {
	Variable    string
	Value       any // in effect; "" where there is none
	Description string
}

// Show lists all settings.
func (s Settings) Show() []Shown {
	host := ""
	if s.HostLimit != NoLimit {
		host = s.HostText
	}
	var maxCtx any = ""
	if s.MaxCtx > 0 {
		maxCtx = s.MaxCtx
	}
	return []Shown{
		{EnabledVariable, s.Enabled, "Map memory of models only where it is in use, within one limit for all models (default false)"},
		{MemoryVariable, s.LimitText(), "Memory that all loaded models may hold together on each GPU, e.g. 20, 1.5GB or 16GiB (default: 95% of the GPU)"},
		{SocketVariable, s.Socket, "Path of the kvcachedd service's unix socket, to share the limit with other servers (default: no service)"},
		{PolicyVariable, s.Policy, "Which idle model sleeps first when memory is wanted: lru (default \"lru\")"},
		{HostMemoryVariable, host, "Host memory for models that sleep, e.g. 20, 1.5GB or 16GiB (default: half of the memory there is)"},
		{IdleVariable, int(s.Idle.Seconds()), "Seconds after which an idle model sleeps even if no memory is wanted (default 0: it does not)"},
		{SleepVariable, int(s.Sleep.Seconds()), "Seconds after which a sleeping model is unloaded (default 1800)"},
		{MaxCtxVariable, maxCtx, "Context that is reserved for each model, so that a larger num_ctx needs no reload (default: the context it is loaded with)"},
		{SystemGroupVariable, s.Group, "System group that may read how much memory models hold (default: none)"},
	}
}
