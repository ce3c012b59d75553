package main

import (
	"errors"
	"sync"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/stretchr/testify/require"
)

func TestGuard(t *testing.T) {
	for want, body := range []func() error{
		func() error { return nil },
		func() error { return errors.New("of any kind") },
		func() error { return fault.New(fault.Handle, "stale") },
		3: nil, // NNG_EFORK comes from shim.c
		4: func() error { return busy("run") },
		5: func() error { panic("a bug") },
	} {
		if body != nil {
			require.EqualValues(t, want, guard(nil, body))
		}
	}
	var none []int
	require.EqualValues(t, 5, guard(nil, func() error { none[len(none)]++; return nil }))
}

func TestTable(t *testing.T) {
	numbers := &table[int]{name: "number", kind: 9 << 56, items: map[uint64]int{}}
	a, b := numbers.add(1), numbers.add(2)
	require.NotEqual(t, a, b)
	v, err := numbers.take(a)
	require.NoError(t, err)
	require.Equal(t, 1, v)
	for _, try := range []func(uint64) (int, error){numbers.get, numbers.take} {
		_, err = try(a)
		require.ErrorContains(t, err, "this number has been closed")
		for _, foreign := range []uint64{0, b + 1, b &^ (9 << 56), b ^ 1<<60} {
			_, err = try(foreign)
			require.ErrorContains(t, err, "is not a handle of a number")
		}
	}
	require.NotEqual(t, a, numbers.add(3), "a handle is never used twice")
	require.Equal(t, 2, numbers.count())

	var wait sync.WaitGroup
	for range 8 {
		wait.Go(func() {
			for i := range 100 {
				h := numbers.add(i)
				if v, err := numbers.take(h); v != i || err != nil {
					t.Error(v, err)
				}
			}
		})
	}
	wait.Wait()
	require.Equal(t, 2, numbers.count())
}
