package safetensors

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const two = `{"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
	"b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]}}`

// file puts a header's text and room bytes of data together.
func file(header string, room int) []byte {
	out := binary.LittleEndian.AppendUint64(nil, uint64(len(header)))
	return append(append(out, header...), make([]byte, room)...)
}

func TestReadGivesTensorsInTheOrderOfTheirData(t *testing.T) {
	header := `{"__metadata__": {"format": "pt"},
		"late": {"dtype": "I64", "shape": [1], "data_offsets": [2, 10]},
		"none": {"dtype": "F32", "shape": [0, 5], "data_offsets": [2, 2]},
		"early": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2], "comment": {"ignored": [1, {}]}}}   `
	data := file(header, 10)
	infos, err := Read(bytes.NewReader(data), int64(len(data)))
	require.NoError(t, err)
	at := int64(8 + len(header))
	require.Equal(t, []Info{
		{Name: "early", DType: "bool", Shape: []int64{2}, Start: at, Bytes: 2, Width: 1},
		{Name: "none", DType: "float32", Shape: []int64{0, 5}, Start: at + 2, Bytes: 0, Width: 4},
		{Name: "late", DType: "int64", Shape: []int64{1}, Start: at + 2, Bytes: 8, Width: 8},
	}, infos)
}

func TestAnEmptyFileOfNoTensorsIsSound(t *testing.T) {
	data := file("{}", 0)
	infos, err := Read(bytes.NewReader(data), int64(len(data)))
	require.NoError(t, err)
	require.Empty(t, infos)
}

// entryOf is a header of one tensor.
func entryOf(fields string) string { return `{"w": {` + fields + `}}` }

func TestHostileHeadersAreRefused(t *testing.T) {
	const f32 = `"dtype": "F32", `
	for name, c := range map[string]struct {
		header string
		room   int64
		says   string
	}{
		"empty":                     {``, 0, "not a JSON object"},
		"list":                      {`[]`, 0, "not a JSON object"},
		"space first":               {` {}`, 0, "not a JSON object"},
		"cut short":                 {two[:40], 26, "not JSON"},
		"goes on":                   {`{}{}`, 0, "not JSON"},
		"trailing NUL":              {"{}\x00", 0, "not JSON"},
		"trailing comma":            {entryOf(f32 + `"shape": [1], "data_offsets": [0, 4],`), 4, "not JSON"},
		"bad UTF-8":                 {"{\"\xff\": {}}", 0, "not JSON"},
		"too deep":                  {`{"w": ` + strings.Repeat("[", 20000) + strings.Repeat("]", 20000) + `}`, 0, "not JSON"},
		"tensor is a list":          {`{"w": []}`, 0, `tensor "w" is not a JSON object`},
		"tensor is null":            {`{"w": null}`, 0, `tensor "w" is not a JSON object`},
		"same name twice":           {`{"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "w": {}}`, 0, `its header holds "w" twice`},
		"same name, escaped":        {`{"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "\u0077": {}}`, 0, `holds "w" twice`},
		"same field twice":          {entryOf(f32 + `"shape": [1], "shape": [2], "data_offsets": [0, 8]`), 8, `tensor "w" holds "shape" twice`},
		"metadata twice":            {`{"__metadata__": {}, "__metadata__": {}}`, 0, "twice"},
		"metadata of numbers":       {`{"__metadata__": {"n": 1}}`, 0, `its metadata "n" is not a string`},
		"metadata list":             {`{"__metadata__": []}`, 0, "its metadata is not a JSON object"},
		"no dtype":                  {entryOf(`"shape": [1], "data_offsets": [0, 4]`), 4, "has no dtype"},
		"field of another case":     {entryOf(`"DTYPE": "F32", "shape": [1], "data_offsets": [0, 4]`), 4, "has no dtype"},
		"no shape":                  {entryOf(f32 + `"data_offsets": [0, 4]`), 4, "has no shape"},
		"null shape":                {entryOf(f32 + `"shape": null, "data_offsets": [0, 4]`), 4, "shape that is not a list"},
		"no offsets":                {entryOf(f32 + `"shape": [1]`), 4, "has no data_offsets"},
		"unknown dtype":             {entryOf(`"dtype": "F4", "shape": [2], "data_offsets": [0, 1]`), 1, `unsupported dtype "F4"`},
		"dtype of another case":     {entryOf(`"dtype": "f32", "shape": [1], "data_offsets": [0, 4]`), 4, `unsupported dtype "f32"`},
		"dtype is a number":         {entryOf(`"dtype": 32, "shape": [1], "data_offsets": [0, 4]`), 4, "dtype that is not a string"},
		"negative size":             {entryOf(f32 + `"shape": [-1], "data_offsets": [0, 4]`), 4, "has -1 in its shape"},
		"fraction":                  {entryOf(f32 + `"shape": [1.5], "data_offsets": [0, 4]`), 4, "has 1.5 in its shape"},
		"float":                     {entryOf(f32 + `"shape": [1e0], "data_offsets": [0, 4]`), 4, "has 1e0 in its shape"},
		"size beyond int64":         {entryOf(f32 + `"shape": [9223372036854775808], "data_offsets": [0, 4]`), 4, "not a possible size"},
		"string size":               {entryOf(f32 + `"shape": ["1"], "data_offsets": [0, 4]`), 4, "something else than numbers"},
		"nested size":               {entryOf(f32 + `"shape": [[1]], "data_offsets": [0, 4]`), 4, "something else than numbers"},
		"null size":                 {entryOf(f32 + `"shape": [null], "data_offsets": [0, 4]`), 4, "something else than numbers"},
		"too many axes":             {entryOf(f32 + `"shape": [` + strings.Repeat("1,", 16) + `1], "data_offsets": [0, 4]`), 4, "more than 16"},
		"product overflows to fit":  {entryOf(f32 + `"shape": [4294967296, 4294967296, 1], "data_offsets": [0, 0]`), 0, "impossible sizes"},
		"product overflows by zero": {entryOf(f32 + `"shape": [0, 4294967296, 4294967296], "data_offsets": [0, 0]`), 0, "impossible sizes"},
		"bytes overflow":            {entryOf(f32 + fmt.Sprintf(`"shape": [%d], "data_offsets": [0, 4]`, int64(math.MaxInt64/4+1))), 4, "impossible sizes"},
		"one offset":                {entryOf(f32 + `"shape": [1], "data_offsets": [4]`), 4, "claims bytes [4]"},
		"three offsets":             {entryOf(f32 + `"shape": [1], "data_offsets": [0, 4, 8]`), 4, "more than 2"},
		"offsets turned around":     {entryOf(f32 + `"shape": [1], "data_offsets": [4, 0]`), 4, "claims bytes [4 0]"},
		"beyond the end":            {entryOf(f32 + `"shape": [2], "data_offsets": [0, 8]`), 4, "claims bytes [0 8] of the 4"},
		"negative offset":           {entryOf(f32 + `"shape": [1], "data_offsets": [-4, 0]`), 4, "has -4 in its data_offsets"},
		"too few bytes":             {entryOf(f32 + `"shape": [2], "data_offsets": [0, 4]`), 4, "takes 8 bytes, not the 4"},
		"hole":                      {entryOf(f32 + `"shape": [1], "data_offsets": [4, 8]`), 8, "begins at byte 4 instead of 0"},
		"data nobody owns":          {entryOf(f32 + `"shape": [1], "data_offsets": [0, 4]`), 8, "take 4 bytes and its data has 8"},
		"overlap": {`{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
			"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}`, 12, `tensor "b" begins at byte 4 instead of 8`},
		"shared": {`{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
			"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}`, 4, `tensor "b" begins at byte 0 instead of 4`},
	} {
		t.Run(name, func(t *testing.T) {
			infos, err := Parse([]byte(c.header), c.room)
			require.ErrorContains(t, err, c.says)
			require.Nil(t, infos)
		})
	}
}

func TestLengthsAreCheckedBeforeTheyAreUsed(t *testing.T) {
	for name, c := range map[string]struct {
		data []byte
		size int64
		says string
	}{
		"too short":          {[]byte("1234567"), 7, "too few for a header"},
		"longer than file":   {file(two, 26)[:50], 50, "bytes and 42 are there"},
		"all ones":           {bytes.Repeat([]byte{0xff}, 16), 16, "claims 18446744073709551615 bytes"},
		"more than allowed":  {binary.LittleEndian.AppendUint64(nil, MaxHeader+1), 1 << 40, "more than the 100000000"},
		"data cut short":     {file(two, 25), int64(len(file(two, 25))), `tensor "b" claims bytes [24 26] of the 25`},
		"shorter than it is": {[]byte("123456789"), 8 + 1<<60, "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "shorter than it is" { // the file shrank after its size was taken
				c.data = append(binary.LittleEndian.AppendUint64(nil, 9), '{')
			}
			_, err := Read(bytes.NewReader(c.data), c.size)
			require.ErrorContains(t, err, c.says)
		})
	}
}

// FuzzParse holds what every accepted header must promise: tensors fill the data exactly, in order,
// and their sizes multiply to their bytes.
func FuzzParse(f *testing.F) {
	f.Add([]byte(two), int64(26))
	f.Add([]byte(`{"__metadata__": {"format": "pt"}}`), int64(0))
	f.Add([]byte(entryOf(`"dtype": "F64", "shape": [0, 7], "data_offsets": [0, 0], "x": [{"y": null}]`)), int64(0))
	f.Add([]byte(entryOf(`"dtype": "I8", "shape": [9223372036854775807], "data_offsets": [0, 9223372036854775807]`)), int64(math.MaxInt64))
	f.Add([]byte(entryOf(`"dtype": "I64", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]`)), int64(0))
	f.Fuzz(func(t *testing.T, text []byte, room int64) {
		if room < 0 {
			return
		}
		infos, err := Parse(text, room)
		if err != nil {
			require.Nil(t, infos)
			return
		}
		at, names := int64(0), map[string]bool{}
		for _, i := range infos {
			require.False(t, names[i.Name], "two tensors named %q", i.Name)
			names[i.Name] = true
			require.Equal(t, at, i.Start)
			want := i.Width
			for _, n := range i.Shape {
				require.GreaterOrEqual(t, n, int64(0))
				if n > 0 && want > 0 {
					require.LessOrEqual(t, want, math.MaxInt64/n)
				}
				want *= n
			}
			require.Equal(t, want, i.Bytes)
			at += i.Bytes
		}
		require.Equal(t, room, at)
	})
}

// FuzzRead holds that no file makes the reader panic or take more memory than the file has bytes.
func FuzzRead(f *testing.F) {
	f.Add(file(two, 26))
	f.Add(file("{}", 0))
	f.Add(bytes.Repeat([]byte{0xff}, 16))
	f.Fuzz(func(t *testing.T, data []byte) {
		infos, err := Read(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			return
		}
		for _, i := range infos {
			require.LessOrEqual(t, i.Start+i.Bytes, int64(len(data)))
			require.GreaterOrEqual(t, i.Start, int64(8))
		}
	})
}
