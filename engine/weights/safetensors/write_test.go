package safetensors

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestEncodeIsRead(t *testing.T) {
	given := []Entry{
		{Name: "a \"name\"", DType: "uint8", Shape: []int64{3}, Data: []byte{1, 2, 3}},
		{Name: "scalar", DType: "float64", Data: make([]byte, 8)},
		{Name: "none", DType: "int64", Shape: []int64{0, 4}},
		{Name: "half", DType: "bfloat16", Shape: []int64{1, 2}, Data: []byte{4, 5, 6, 7}},
	}
	file, err := Encode(given)
	require.NoError(t, err)
	infos, err := Read(bytes.NewReader(file), int64(len(file)))
	require.NoError(t, err)
	require.Len(t, infos, len(given))
	for _, info := range infos {
		if info.Width > 0 {
			require.Zero(t, info.Start%info.Width, info.Name)
		}
		for _, e := range given {
			if e.Name == info.Name {
				require.Equal(t, e.DType, info.DType)
				require.Equal(t, append([]int64{}, e.Shape...), append([]int64{}, info.Shape...))
				require.Equal(t, append([]byte{}, e.Data...), append([]byte{}, file[info.Start:info.Start+info.Bytes]...))
			}
		}
	}
	_, err = Encode([]Entry{{Name: "x", DType: "complex32"}})
	require.ErrorContains(t, err, "complex32")
}

func TestEncodeNothing(t *testing.T) {
	file, err := Encode(nil)
	require.NoError(t, err)
	infos, err := Read(bytes.NewReader(file), int64(len(file)))
	require.NoError(t, err)
	require.Empty(t, infos)
}
