// Package keys keeps the API keys of a server in a file: their hashes, never the keys themselves.
//
// A key is 256 random bits, so that a plain SHA-256 of it gives nothing away. [Store] reads the file again
// when it changes: keys are made and revoked while the server runs.
package keys

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/server/jobs"
)

// prefix begins every key, so that one that was left in a file is found for what it is.
const prefix = "nng_"

// Key is what is kept of a key.
type Key struct {
	ID       string      `json:"id"`   // names it in lists and logs
	Name     string      `json:"name"` // of whoever has it
	Hash     string      `json:"hash"` // SHA-256, in hexadecimal
	Priority string      `json:"priority,omitempty"`
	Rate     float64     `json:"rate,omitempty"`  // jobs a second; 0 is the server's own limit
	Limits   jobs.Limits `json:"limits,omitzero"` // of one job; those of the server hold as well
	Created  time.Time   `json:"created"`
	Expires  *time.Time  `json:"expires,omitempty"`
	Revoked  *time.Time  `json:"revoked,omitempty"`
}

// Usable reports whether the key opens anything at a time.
func (k *Key) Usable(now time.Time) bool {
	return k.Revoked == nil && (k.Expires == nil || now.Before(*k.Expires))
}

// Store is a file of keys. Any number of goroutines may use it; two processes that change the file at the
// same moment may lose one of the changes.
type Store struct {
	path string
	mu   sync.Mutex
	read time.Time // when the file was changed that keys are from
	keys []Key
}

// Open gives the keys of a file, which need not be there.
func Open(path string) *Store { return &Store{path: path} }

// All gives the keys, revoked and expired ones included.
func (s *Store) All() ([]Key, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.load()
}

func (s *Store) load() ([]Key, error) {
	stat, err := os.Stat(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, unreadable(s.path, err)
	}
	if stat.ModTime().Equal(s.read) {
		return s.keys, nil
	}
	data, err := os.ReadFile(s.path)
	if err != nil {
		return nil, unreadable(s.path, err)
	}
	var keys []Key
	if err := json.Unmarshal(data, &keys); err != nil {
		return nil, unreadable(s.path, err)
	}
	s.keys, s.read = keys, stat.ModTime()
	return keys, nil
}

func unreadable(path string, err error) error {
	return fault.New(fault.Remote, "the keys in %s cannot be read: %v", path, err)
}

// Create makes a key and gives it. It cannot be shown again.
func (s *Store) Create(k Key) (string, *Key, error) {
	var secret [32]byte
	var id [6]byte
	_, _ = rand.Read(secret[:]) // never fails
	_, _ = rand.Read(id[:])
	text := prefix + base64.RawURLEncoding.EncodeToString(secret[:])
	k.ID, k.Hash, k.Created = hex.EncodeToString(id[:]), hash(text), time.Now().UTC().Truncate(time.Second)
	err := s.change(func(keys []Key) ([]Key, error) { return append(keys, k), nil })
	return text, &k, err
}

// Revoke ends a key, by its id.
func (s *Store) Revoke(id string) error {
	return s.change(func(keys []Key) ([]Key, error) {
		for i := range keys {
			if keys[i].ID == id {
				if keys[i].Revoked == nil {
					now := time.Now().UTC().Truncate(time.Second)
					keys[i].Revoked = &now
				}
				return keys, nil
			}
		}
		return nil, fault.New(fault.Remote, "there is no key %q", id).WithHint("`nnsight-go key list` shows all.")
	})
}

// change writes the file anew; whoever reads it meanwhile sees the old one or the new one.
func (s *Store) change(f func([]Key) ([]Key, error)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	known, err := s.load()
	if err != nil {
		return err
	}
	keys, err := f(append([]Key{}, known...))
	if err != nil {
		return err
	}
	data, err := json.MarshalIndent(keys, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(s.path), 0o700); err != nil {
		return unwritable(s.path, err)
	}
	file, err := os.CreateTemp(filepath.Dir(s.path), ".keys-*") // readable by its owner alone
	if err != nil {
		return unwritable(s.path, err)
	}
	defer func() { _ = os.Remove(file.Name()) }()
	_, err = file.Write(data)
	if err = errors.Join(err, file.Sync(), file.Close()); err == nil {
		err = os.Rename(file.Name(), s.path)
	}
	if err != nil {
		return unwritable(s.path, err)
	}
	s.read = time.Time{}
	return nil
}

func unwritable(path string, err error) error {
	return fault.New(fault.Remote, "the keys in %s cannot be written: %v", path, err)
}

// Find gives the key that a text is, or nil where it is none that is usable now.
func (s *Store) Find(text string) (*Key, error) {
	keys, err := s.All()
	if err != nil {
		return nil, err
	}
	if !strings.HasPrefix(text, prefix) || len(text) > 128 {
		return nil, nil
	}
	given, now := []byte(hash(text)), time.Now()
	var found *Key
	for i := range keys { // all of them, so that time does not tell which
		if subtle.ConstantTimeCompare(given, []byte(keys[i].Hash)) == 1 && keys[i].Usable(now) {
			found = &keys[i]
		}
	}
	return found, nil
}

func hash(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}
