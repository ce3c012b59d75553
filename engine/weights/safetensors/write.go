package safetensors

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
)

// Entry is a tensor to be written.
type Entry struct {
	Name  string
	DType string  // torch's name
	Shape []int64 // sizes; empty for a scalar
	Data  []byte  // its elements, row-major and little endian
}

// formats maps torch's dtypes to the format's names: dtypes, the other way round.
var formats = func() map[string]string {
	out := make(map[string]string, len(dtypes))
	for format, d := range dtypes {
		out[d.name] = format
	}
	return out
}()

// Encode gives a file that holds tensors. The widest elements come first, so that every tensor lies at a
// multiple of its element's size.
func Encode(entries []Entry) ([]byte, error) {
	entries = slices.Clone(entries)
	slices.SortStableFunc(entries, func(a, b Entry) int {
		return cmp.Compare(dtypes[formats[b.DType]].width, dtypes[formats[a.DType]].width)
	})
	var head bytes.Buffer
	head.WriteByte('{')
	at := int64(0)
	for i, e := range entries {
		format, ok := formats[e.DType]
		if !ok {
			return nil, fmt.Errorf("tensor %q has the dtype %s, which the format does not have", e.Name, e.DType)
		}
		if i > 0 {
			head.WriteByte(',')
		}
		name, err := json.Marshal(e.Name)
		if err != nil {
			return nil, err
		}
		shape, err := json.Marshal(append([]int64{}, e.Shape...))
		if err != nil {
			return nil, err
		}
		next := at + int64(len(e.Data))
		fmt.Fprintf(&head, `%s:{"dtype":%q,"shape":%s,"data_offsets":[%d,%d]}`, name, format, shape, at, next)
		at = next
	}
	head.WriteByte('}')
	for head.Len()%8 != 0 { // the data begin at a multiple of eight
		head.WriteByte(' ')
	}
	out := make([]byte, 0, 8+head.Len()+int(at))
	out = binary.LittleEndian.AppendUint64(out, uint64(head.Len()))
	out = append(out, head.Bytes()...)
	for _, e := range entries {
		out = append(out, e.Data...)
	}
	return out, nil
}
