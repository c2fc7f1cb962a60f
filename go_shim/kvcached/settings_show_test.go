package kvcached

import (
	"slices"
	"testing"
	"time"
)

func TestShow(t *testing.T) {
	values := func(s Settings) (values []any) {
		for i, shown := range s.Show() {
			if shown.Variable != table[i].variable || shown.Description == "" {
				t.Errorf("%d: %+v, want %s", i, shown, table[i].variable)
			}
			values = append(values, shown.Value)
		}
		return values
	}
	if got, want := values(defaults()), []any{false, "", "", "lru", "", 0, 1800, "", ""}; !slices.Equal(got, want) {
		t.Errorf("defaults: %v, want %v", got, want)
	}
	all := Settings{
		Enabled: true, Limit: 20e9, Socket: "/run/s", Policy: "lru", HostLimit: 1 << 30, HostText: "1GiB",
		Idle: time.Minute, Sleep: time.Hour, MaxCtx: 65536, Group: "video",
	}
	if got, want := values(all), []any{true, "20 GB", "/run/s", "lru", "1GiB", 60, 3600, 65536, "video"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if len(defaults().Show()) != len(table) {
		t.Error("a setting is not shown")
	}
}
