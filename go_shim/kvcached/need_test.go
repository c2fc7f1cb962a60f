package kvcached

import (
	"math"
	"slices"
	"testing"
)

func TestNeedTotal(t *testing.T) {
	need := Need{Weights: 100, FirstStep: 20, Compute: 7, Context: 3, Outside: 40, Reserved: 5000}
	if need.Total() != 130 || need.Fixed() != 43 {
		t.Errorf("%d, %d", need.Total(), need.Fixed())
	}
}

func TestNeedSplit(t *testing.T) {
	need := Need{Weights: 1000, FirstStep: 101, Compute: 7, Context: 3, Outside: 10, Reserved: 5000, Inexact: "why"}
	if got := need.Split([]uint64{5}); !slices.Equal(got, []Need{need}) {
		t.Errorf("on one device: %+v", got)
	}
	if got := need.Split([]uint64{0, math.MaxUint64, 0}); !slices.Equal(got, []Need{{}, need, {}}) {
		t.Errorf("on one of three: %+v", got)
	}
	for _, parts := range [][]uint64{{1, 1}, {3, 1}, {1, 1, 1}, {80 << 30, 24 << 30, 1}, {7, 0, 11, 13}} {
		var sum Need
		for i, share := range need.Split(parts) {
			if parts[i] == 0 {
				if share != (Need{}) {
					t.Errorf("%v: %+v for nothing", parts, share)
				}
				continue
			}
			if share.Compute != need.Compute || share.Context != need.Context || share.Inexact != need.Inexact {
				t.Errorf("%v: %+v", parts, share)
			}
			sum.Weights, sum.FirstStep = sum.Weights+share.Weights, sum.FirstStep+share.FirstStep
			sum.Outside, sum.Reserved = sum.Outside+share.Outside, sum.Reserved+share.Reserved
		}
		most := uint64(len(parts))
		for _, pair := range [][2]uint64{
			{sum.Weights, need.Weights}, {sum.FirstStep, need.FirstStep}, {sum.Outside, need.Outside}, {sum.Reserved, need.Reserved},
		} {
			if pair[0] < pair[1] || pair[0] > pair[1]+most {
				t.Errorf("%v: the shares are %d of %d together", parts, pair[0], pair[1])
			}
		}
	}
	if got := need.Split([]uint64{3, 1}); got[0].Weights < 750 || got[0].Weights > 751 || got[1].Weights > 251 {
		t.Errorf("three to one: %+v", got)
	}
	if got := need.Split([]uint64{0, 0}); !slices.Equal(got, make([]Need, 2)) {
		t.Errorf("to nobody: %+v", got)
	}
}
