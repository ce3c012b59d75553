package plan_test

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/plan"
	"github.com/nnsight-go/nnsight-go/engine/plan/plantest"
	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "rewrite the transcripts in testdata")

// TestTranscripts splices each trace of testdata and holds the schedule against the one written
// below it. Commit a rewritten transcript only when its difference can be explained.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	const bar = "----\n"
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			require.NoError(t, err)
			trace, want, _ := strings.Cut(string(text), bar)
			m := plantest.Model(3)
			got := ""
			schedule, err := plan.Splice(plantest.Parse(t, trace), plan.Models{Causal: m, Masked: m})
			if err != nil {
				got = err.Error() + "\n"
			} else {
				got = schedule.String()
			}
			if *update {
				require.NoError(t, os.WriteFile(file, []byte(trace+bar+got), 0o644))
				return
			}
			require.Equal(t, want, got)
		})
	}
}

func TestErrors(t *testing.T) {
	m := plantest.Model(3)
	models := plan.Models{Causal: m, Masked: m}
	for name, c := range map[string]struct {
		trace string
		code  fault.Code
		says  string
	}{
		"unknown module": {"invoke 2\nh = l.7.output.0\nsave h", fault.ModulePath, `no module "l.7"`},
		"never runs":     {"invoke 2\nh = .output\nsave h", fault.ModulePath, "never runs"},
		"unknown leaf":   {"invoke 2\nh = l.1.output.5\nsave h", fault.ModulePath, `no tensor "5"`},
		"late write":     {"invoke 2\nh = l.2.output.0\nl.1.output.0 = h", fault.OutOfOrder, "an earlier line went on to the output of l.2"},
		"no input":       {"invoke whole\nh = l.1.output.0\nsave h", fault.Input, "no input"},
		"plain value":    {"invoke 2\nl.1.output.0 = 3", fault.Op, "cannot become a plain value"},
		"wrong argument": {"invoke 2\nh = l.1.output.0\ny = call head h h\nsave y", fault.Op, "does not take these arguments"},
		"whole batch": {"invoke 2\nh = l.2.output.0\nsave h\ninvoke 2\nl.0.output.0 = h\ny = head.output\nsave y\ninvoke whole\nz = head.output\nsave z",
			fault.Input, "sees the whole batch"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := plan.Splice(plantest.Parse(t, c.trace), models)
			require.Error(t, err)
			require.Equal(t, c.code, fault.As(err).Code)
			require.Contains(t, err.Error(), c.says)
		})
	}
}
