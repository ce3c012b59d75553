package host

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// What a device does is tested in Python (tests/simdevice): here is which captures are kept.
func TestCapturesAreFew(t *testing.T) {
	all := &captures{most: 2}
	add := func() *capture {
		one := &capture{made: &captured{}}
		one.mu.Lock()
		surplus := all.use(one)
		one.mu.Unlock()
		drop(surplus)
		return one
	}
	a, b := add(), add()
	require.NotNil(t, a.made)
	all.use(a)
	c := add()
	require.Nil(t, b.made, "it was used before the others")
	require.NotNil(t, a.made)
	require.Equal(t, 2, all.recent.Len())

	a.mu.Lock() // a run is at it
	d := add()
	require.NotNil(t, a.made)
	require.Equal(t, 3, all.recent.Len(), "one more, rather than a wait")
	a.mu.Unlock()
	add()
	require.Nil(t, a.made)
	require.Nil(t, c.made)
	require.Equal(t, 2, all.recent.Len())

	d.mu.Lock()
	all.forget(d)
	all.forget(d)
	d.mu.Unlock()
	require.Equal(t, 1, all.recent.Len())
	drop(all.all())
	require.Zero(t, all.recent.Len())
	require.NotNil(t, d.made, "whoever forgets one has it")
}
