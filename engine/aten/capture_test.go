package aten_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/stretchr/testify/require"
)

// Where torch has CUDA, but this machine no GPU, there is a clear error, and nothing is left behind.
func TestCaptureWithoutAGPU(t *testing.T) {
	require.False(t, aten.CanCapture("cpu"))
	require.False(t, aten.CanCapture("no device"))
	_, err := aten.BeginCapture("cpu")
	require.ErrorContains(t, err, "captures no graphs on cpu")
	dir, err := aten.LibraryDir()
	require.NoError(t, err)
	_, err = os.Stat(filepath.Join(dir, "libnng_cuda.so"))
	require.Equal(t, err == nil, aten.CanCapture("cuda:0"), "what was built is found")
	if aten.CUDAAvailable() {
		t.Skip("there is a GPU")
	}
	_, err = aten.BeginCapture("cuda:0")
	require.Error(t, err)
	require.Zero(t, aten.Captures())
}
