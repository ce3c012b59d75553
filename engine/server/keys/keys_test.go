package keys

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestKeys(t *testing.T) {
	path := filepath.Join(t.TempDir(), "data", "keys.json")
	s := Open(path)
	none, err := s.All()
	require.NoError(t, err)
	require.Empty(t, none)
	text, made, err := s.Create(Key{Name: "Ada", Priority: "high"})
	require.NoError(t, err)
	stored, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NotContains(t, string(stored), text, "the key itself is nowhere")
	stat, err := os.Stat(path)
	require.NoError(t, err)
	require.EqualValues(t, 0o600, stat.Mode().Perm())

	other := Open(path) // another process
	found, err := other.Find(text)
	require.NoError(t, err)
	require.Equal(t, made.ID, found.ID)
	require.Equal(t, "Ada", found.Name)
	for _, wrong := range []string{"", prefix, text + "x", text[:len(text)-1], strings.ToUpper(text), made.Hash, strings.Repeat("nng_", 1000)} {
		found, err = other.Find(wrong)
		require.NoError(t, err)
		require.Nil(t, found)
	}
	require.NoError(t, s.Revoke(made.ID))
	require.Eventually(t, func() bool { found, err = other.Find(text); return err == nil && found == nil }, time.Second, time.Millisecond)
	require.ErrorContains(t, s.Revoke("nobody"), `no key "nobody"`)
}

func TestKeysExpire(t *testing.T) {
	s := Open(filepath.Join(t.TempDir(), "keys.json"))
	past, future := time.Now().Add(-time.Second), time.Now().Add(time.Hour)
	old, _, err := s.Create(Key{Expires: &past})
	require.NoError(t, err)
	young, _, err := s.Create(Key{Expires: &future})
	require.NoError(t, err)
	found, err := s.Find(old)
	require.NoError(t, err)
	require.Nil(t, found)
	found, err = s.Find(young)
	require.NoError(t, err)
	require.NotNil(t, found)
}

func TestASpoiltFileIsAnError(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.json")
	require.NoError(t, os.WriteFile(path, []byte("{"), 0o600))
	_, err := Open(path).Find("nng_x")
	require.ErrorContains(t, err, "cannot be read")
}
