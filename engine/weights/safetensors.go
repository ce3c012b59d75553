// Package weights reads model directories in Hugging Face's layout: config.json, safetensors in one
// file or in shards, and the local hub cache.
//
// Phases: [ReadConfig] and [Open] read the config and the headers only, so that a directory of any
// size opens in milliseconds; [Checkpoint.Tensor] lends tensors over a private mapping of the file,
// without a copy. Headers are treated as hostile: every size and offset is checked before use.
//
// Ownership: a mapping lives until the checkpoint is closed and the last tensor over it has died,
// whichever is later. Errors are *fault.Error of code ModelLoad, naming the file and what to do.
package weights

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// maxHeader is the most a header may take, as in the reference implementation.
const maxHeader = 100 << 20

// dtypes maps safetensors' names to torch's, with the bytes an element takes.
var dtypes = map[string]struct {
	name  string
	bytes int64
}{
	"F64": {"float64", 8}, "F32": {"float32", 4}, "F16": {"float16", 2}, "BF16": {"bfloat16", 2},
	"I64": {"int64", 8}, "I32": {"int32", 4}, "I16": {"int16", 2}, "I8": {"int8", 1}, "U8": {"uint8", 1}, "BOOL": {"bool", 1},
	"F8_E5M2": {"float8_e5m2", 1}, "F8_E4M3": {"float8_e4m3fn", 1},
}

// Info describes one tensor of a checkpoint.
type Info struct {
	Name  string
	DType string  // torch's name: "float32"
	Shape []int64 // sizes
	Start int64   // first byte, counted from the start of the file
	Bytes int64
}

// readHeader reads and checks the header of a safetensors file. file is its name, for messages.
func readHeader(r io.ReaderAt, size int64, file string) ([]Info, error) {
	bad := func(format string, args ...any) error {
		return fault.New(fault.ModelLoad, "%s is not a sound safetensors file: %s", file, fmt.Sprintf(format, args...)).
			WithHint("It may be corrupt or cut short: copy or download it again.")
	}
	var head [8]byte
	if size < 8 {
		return nil, bad("it has %d bytes, too few for a header", size)
	}
	if _, err := r.ReadAt(head[:], 0); err != nil {
		return nil, bad("%v", err)
	}
	length := binary.LittleEndian.Uint64(head[:])
	if length > maxHeader || length > uint64(size-8) {
		return nil, bad("its header claims %d bytes of the %d there are", length, size-8)
	}
	text := make([]byte, length)
	if _, err := r.ReadAt(text, 8); err != nil {
		return nil, bad("%v", err)
	}
	infos, err := parseHeader(text, size-8-int64(length))
	if err != nil {
		return nil, bad("%v", err)
	}
	for i := range infos {
		infos[i].Start += 8 + int64(length)
	}
	return infos, nil
}

// parseHeader reads a header whose data part has room bytes: the tensors in the order of their
// data, which they must fill without holes or overlaps. Offsets count from the start of the data.
func parseHeader(text []byte, room int64) ([]Info, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, fmt.Errorf("its header is not a JSON object")
	}
	var infos []Info
	seen := map[string]bool{}
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return nil, fmt.Errorf("its header is not JSON: %w", err)
		}
		name, _ := t.(string)
		if seen[name] {
			return nil, fmt.Errorf("tensor %q is there twice", name)
		}
		seen[name] = true
		if name == "__metadata__" {
			var metadata map[string]string
			if err := d.Decode(&metadata); err != nil {
				return nil, fmt.Errorf("its metadata is not a map of strings: %w", err)
			}
			continue
		}
		var e struct {
			DType   string  `json:"dtype"`
			Shape   []int64 `json:"shape"`
			Offsets []int64 `json:"data_offsets"`
		}
		if err := d.Decode(&e); err != nil {
			return nil, fmt.Errorf("tensor %q cannot be read: %w", name, err)
		}
		info, err := checkEntry(name, e.DType, e.Shape, e.Offsets, room)
		if err != nil {
			return nil, err
		}
		infos = append(infos, info)
	}
	if _, err := d.Token(); err != nil {
		return nil, fmt.Errorf("its header is cut short")
	}
	rest := text[d.InputOffset():]
	if len(bytes.Trim(rest, " \t\r\n")) > 0 {
		return nil, fmt.Errorf("its header goes on after its end")
	}
	slices.SortFunc(infos, func(a, b Info) int {
		if a.Start != b.Start {
			return int(min(max(a.Start-b.Start, -1), 1))
		}
		return int(min(max(a.Bytes-b.Bytes, -1), 1))
	})
	at := int64(0)
	for _, i := range infos {
		if i.Start != at {
			return nil, fmt.Errorf("the data of tensor %q begins at byte %d instead of %d", i.Name, i.Start, at)
		}
		at += i.Bytes
	}
	if at != room {
		return nil, fmt.Errorf("its tensors take %d bytes and its data has %d", at, room)
	}
	return infos, nil
}

func checkEntry(name, dtype string, shape, offsets []int64, room int64) (Info, error) {
	d, ok := dtypes[dtype]
	if !ok {
		return Info{}, fmt.Errorf("tensor %q has the unknown dtype %q", name, dtype)
	}
	if len(shape) > 16 {
		return Info{}, fmt.Errorf("tensor %q has %d axes", name, len(shape))
	}
	want := d.bytes
	for _, n := range shape {
		if n < 0 || n > 0 && want > math.MaxInt64/n {
			return Info{}, fmt.Errorf("tensor %q has impossible sizes %v", name, shape)
		}
		want *= n
	}
	if len(offsets) != 2 || offsets[0] < 0 || offsets[1] < offsets[0] || offsets[1] > room {
		return Info{}, fmt.Errorf("tensor %q claims bytes %v of the %d there are", name, offsets, room)
	}
	if offsets[1]-offsets[0] != want {
		return Info{}, fmt.Errorf("tensor %q of sizes %v and dtype %s takes %d bytes, not the %d it claims",
			name, shape, d.name, want, offsets[1]-offsets[0])
	}
	return Info{Name: name, DType: d.name, Shape: shape, Start: offsets[0], Bytes: want}, nil
}

// shardNames lists the weight files of a model directory.
func shardNames(dir string) ([]string, error) {
	const single, index = "model.safetensors", "model.safetensors.index.json"
	if _, err := os.Stat(filepath.Join(dir, single)); err == nil {
		return []string{single}, nil
	}
	text, err := os.ReadFile(filepath.Join(dir, index))
	if err != nil {
		return nil, noWeights(dir)
	}
	var parsed struct {
		WeightMap map[string]string `json:"weight_map"`
	}
	if err := json.Unmarshal(text, &parsed); err != nil || len(parsed.WeightMap) == 0 {
		return nil, fault.New(fault.ModelLoad, "%s is not a safetensors index", filepath.Join(dir, index)).WithCause(err).
			WithHint(`It needs a "weight_map" from tensor names to file names.`)
	}
	var names []string
	for _, name := range parsed.WeightMap {
		if name != filepath.Base(name) || name == "." || name == ".." {
			return nil, fault.New(fault.ModelLoad, "%s names the file %q, which is not in the directory",
				filepath.Join(dir, index), name)
		}
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// noWeights says what a directory holds instead of weights.
func noWeights(dir string) error {
	e := fault.New(fault.ModelLoad, "%s holds no safetensors weights", dir)
	found, _ := filepath.Glob(filepath.Join(dir, "*.bin"))
	if len(found) > 0 {
		return e.WithHint("It holds %s, a pickle, which is not read because loading one can run code. Convert it: "+
			"load it with transformers and call save_pretrained, which writes safetensors.", filepath.Base(found[0]))
	}
	return e.WithHint("A model directory holds model.safetensors, or model.safetensors.index.json with its shards. This one holds: %s.",
		listing(dir))
}

// listing names the first files of a directory.
func listing(dir string) string {
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) == 0 {
		return "nothing"
	}
	var names []string
	for i, e := range entries {
		if i == 8 {
			names = append(names, "...")
			break
		}
		names = append(names, e.Name())
	}
	return strings.Join(names, ", ")
}
