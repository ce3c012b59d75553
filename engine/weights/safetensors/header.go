// Package safetensors reads the headers of safetensors files.
//
// A file is eight bytes of length (little endian), a JSON object of that length that describes each
// tensor, and the tensors' data, one after another without gaps. A header comes from strangers: every
// number in it is checked before anybody uses it, and a file that breaks any rule is refused whole.
// What the rules allow and the reference implementation also does: unknown fields of a tensor are
// ignored, and white space may follow the object.
//
// The package is pure Go, keeps no state and never reads the data. Errors are plain errors that say
// what is wrong with the header; the caller names the file.
package safetensors

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"unicode/utf8"
)

// MaxHeader is the most bytes a header may have, as in the reference implementation.
const MaxHeader = 100_000_000

// maxAxes is the most axes a tensor may have; no checkpoint comes near it.
const maxAxes = 16

// Info describes one tensor of a file.
type Info struct {
	Name  string
	DType string  // torch's name: "float32"
	Shape []int64 // sizes; empty for a scalar
	Start int64   // first byte of its data, counted from the start of the file
	Bytes int64   // length of its data
	Width int64   // bytes an element takes
}

// dtypes maps the format's names to torch's, with the bytes an element takes. The format's types of
// less than a byte (F4, F6) have no torch equal and are refused.
var dtypes = map[string]struct {
	name  string
	width int64
}{
	"F64": {"float64", 8}, "F32": {"float32", 4}, "F16": {"float16", 2}, "BF16": {"bfloat16", 2},
	"F8_E5M2": {"float8_e5m2", 1}, "F8_E4M3": {"float8_e4m3fn", 1},
	"I64": {"int64", 8}, "I32": {"int32", 4}, "I16": {"int16", 2}, "I8": {"int8", 1}, "U8": {"uint8", 1},
	"U64": {"uint64", 8}, "U32": {"uint32", 4}, "U16": {"uint16", 2},
	"BOOL": {"bool", 1}, "C64": {"complex64", 8}, "C128": {"complex128", 16},
}

// Read reads and checks the header of a file of size bytes. The tensors come in the order of their data.
func Read(r io.ReaderAt, size int64) ([]Info, error) {
	if size < 8 {
		return nil, fmt.Errorf("it has %d bytes, too few for a header", size)
	}
	var head [8]byte
	if _, err := r.ReadAt(head[:], 0); err != nil {
		return nil, err
	}
	length := binary.LittleEndian.Uint64(head[:])
	if length > uint64(size-8) {
		return nil, fmt.Errorf("its header claims %d bytes and %d are there", length, size-8)
	}
	if length > MaxHeader {
		return nil, fmt.Errorf("its header claims %d bytes, more than the %d that are allowed", length, MaxHeader)
	}
	text := make([]byte, length)
	if _, err := r.ReadAt(text, 8); err != nil {
		return nil, err
	}
	infos, err := Parse(text, size-8-int64(length))
	if err != nil {
		return nil, err
	}
	for i := range infos {
		infos[i].Start += 8 + int64(length)
	}
	return infos, nil
}

// Parse checks the text of a header whose data has room bytes. The tensors come in the order of their
// data, and their Start counts from the start of the data.
func Parse(text []byte, room int64) ([]Info, error) {
	if len(text) == 0 || text[0] != '{' {
		return nil, fmt.Errorf("its header is not a JSON object")
	}
	if !utf8.Valid(text) || !json.Valid(text) { // what follows may rely on the grammar
		return nil, fmt.Errorf("its header is not JSON")
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var infos []Info
	err := object(d, "its header", func(name string) error {
		if name == "__metadata__" {
			return metadata(d)
		}
		info, err := entry(d, fmt.Sprintf("tensor %q", name), room)
		if err != nil {
			return err
		}
		info.Name = name
		infos = append(infos, info)
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(infos, func(a, b Info) int {
		return cmp.Or(cmp.Compare(a.Start, b.Start), cmp.Compare(a.Bytes, b.Bytes), cmp.Compare(a.Name, b.Name))
	})
	at := int64(0)
	for _, i := range infos { // neither holes nor overlaps
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

// entry reads what the header says of one tensor; who names it in errors, here and below.
func entry(d *json.Decoder, who string, room int64) (Info, error) {
	var dtype string
	var shape, offsets []int64
	seen := map[string]bool{}
	err := object(d, who, func(field string) (err error) {
		seen[field] = true
		switch field {
		case "dtype":
			t, _ := d.Token()
			s, ok := t.(string)
			if !ok {
				return fmt.Errorf("%s has a dtype that is not a string", who)
			}
			dtype = s
		case "shape":
			shape, err = integers(d, who, field, maxAxes)
		case "data_offsets":
			offsets, err = integers(d, who, field, 2)
		default:
			var skipped json.RawMessage
			err = d.Decode(&skipped)
		}
		return err
	})
	if err != nil {
		return Info{}, err
	}
	for _, field := range []string{"dtype", "shape", "data_offsets"} {
		if !seen[field] {
			return Info{}, fmt.Errorf("%s has no %s", who, field)
		}
	}
	return check(who, dtype, shape, offsets, room)
}

// check holds a tensor's sizes against its bytes.
func check(who, dtype string, shape, offsets []int64, room int64) (Info, error) {
	d, ok := dtypes[dtype]
	if !ok {
		return Info{}, fmt.Errorf("%s has the unsupported dtype %q", who, dtype)
	}
	want, empty := d.width, false
	for _, n := range shape {
		if n == 0 {
			empty = true
			continue // the other sizes must still have a product: torch computes strides from it
		}
		if want > math.MaxInt64/n {
			return Info{}, fmt.Errorf("%s has impossible sizes %v", who, shape)
		}
		want *= n
	}
	if empty {
		want = 0
	}
	if len(offsets) != 2 || offsets[1] < offsets[0] || offsets[1] > room {
		return Info{}, fmt.Errorf("%s claims bytes %v of the %d there are", who, offsets, room)
	}
	if got := offsets[1] - offsets[0]; got != want {
		return Info{}, fmt.Errorf("%s of sizes %v and dtype %s takes %d bytes, not the %d it claims", who, shape, d.name, want, got)
	}
	return Info{DType: d.name, Shape: shape, Start: offsets[0], Bytes: want, Width: d.width}, nil
}

// metadata skips the free-form map, which may hold strings only.
func metadata(d *json.Decoder) error {
	return object(d, "its metadata", func(key string) error {
		if t, _ := d.Token(); !isString(t) {
			return fmt.Errorf("its metadata %q is not a string", key)
		}
		return nil
	})
}

func isString(t json.Token) bool { _, ok := t.(string); return ok }

// object reads an object; value is called at each key and must read the value. Keys may stand once.
// The text is known to be JSON, so a token that cannot be read is one of another kind.
func object(d *json.Decoder, who string, value func(key string) error) error {
	if t, _ := d.Token(); t != json.Delim('{') {
		return fmt.Errorf("%s is not a JSON object", who)
	}
	seen := map[string]bool{}
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return fmt.Errorf("%s cannot be read: %w", who, err)
		}
		key, _ := t.(string)
		if seen[key] {
			return fmt.Errorf("%s holds %q twice", who, key)
		}
		seen[key] = true
		if err := value(key); err != nil {
			return err
		}
	}
	_, err := d.Token()
	return err
}

// integers reads a list of up to limit whole numbers that are not negative.
func integers(d *json.Decoder, who, field string, limit int) ([]int64, error) {
	if t, _ := d.Token(); t != json.Delim('[') {
		return nil, fmt.Errorf("%s has a %s that is not a list", who, field)
	}
	out := []int64{}
	for d.More() {
		t, _ := d.Token()
		n, ok := t.(json.Number)
		if !ok {
			return nil, fmt.Errorf("%s has a %s that holds something else than numbers", who, field)
		}
		i, err := strconv.ParseUint(string(n), 10, 63)
		if err != nil {
			return nil, fmt.Errorf("%s has %s in its %s, which is not a possible size", who, n, field)
		}
		if len(out) == limit {
			return nil, fmt.Errorf("%s has more than %d numbers in its %s", who, limit, field)
		}
		out = append(out, int64(i))
	}
	_, err := d.Token()
	return out, err
}
