package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

const envUsage = `usage: nnsight-go env [--lib DIR] [--python PROGRAM] [--json]

Prints export lines for the shell, so that Go can build and run programs that use the engine:

    eval "$(nnsight-go env)"
    go build ./...

The engine's libraries are looked for in --lib or $NNSIGHT_GO_LIB, in a source checkout (around the
current folder, or where the current Go module's replace directive points), and in the nnsight_go
package that --python (else python3) has installed. torch is looked for next to the libraries, then
in that Python; in a checkout it is the one of .venv.

`

// runEnv is `nnsight-go env`.
func runEnv(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("env", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprint(stderr, envUsage)
		flags.PrintDefaults()
	}
	lib := flags.String("lib", os.Getenv("NNSIGHT_GO_LIB"), "folder of the engine's libraries")
	python := flags.String("python", "", "the Python to ask for nnsight_go and torch")
	asJSON := flags.Bool("json", false, "print a JSON object instead of export lines")
	if err := flags.Parse(args); err == flag.ErrHelp {
		return 0
	} else if err != nil || flags.NArg() > 0 {
		if err == nil {
			fmt.Fprintf(stderr, "nnsight-go env: unexpected argument %q\n", flags.Arg(0))
		}
		return 2
	}
	found, err := locate(*lib, *python)
	if err != nil {
		fmt.Fprintf(stderr, "nnsight-go env: %v\n", err)
		return 1
	}
	vars := found.environment(os.Getenv("CGO_LDFLAGS"))
	if *asJSON {
		if err := json.NewEncoder(stdout).Encode(vars); err != nil {
			fmt.Fprintf(stderr, "nnsight-go env: %v\n", err)
			return 1
		}
		return 0
	}
	names := make([]string, 0, len(vars))
	for name := range vars {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintf(stdout, "export %s=%s\n", name, shellQuote(vars[name]))
	}
	return 0
}

// environment gives the variables to set, by name. before is the present CGO_LDFLAGS, which is kept.
func (p places) environment(before string) map[string]string {
	var ours []string
	if p.archive != "" {
		ours = append(ours, "-L"+p.archive)
	}
	ours = append(ours, "-L"+p.lib, "-L"+p.torch, "-Wl,-rpath,"+p.lib, "-Wl,-rpath,"+p.torch)
	for i, flag := range ours {
		ours[i] = flagQuote(flag)
	}
	if before == "" {
		before = "-O2 -g" // what Go takes where nothing is set
	}
	for _, flag := range strings.Fields(before) {
		if !slices.Contains(ours, flag) { // as after a second eval
			ours = append(ours, flag)
		}
	}
	return map[string]string{"CGO_ENABLED": "1", "CGO_LDFLAGS": strings.Join(ours, " ")}
}

// flagQuote quotes a flag for Go, which splits CGO_LDFLAGS at spaces outside quotes.
func flagQuote(s string) string {
	switch {
	case !strings.ContainsAny(s, " \t'\""):
		return s
	case !strings.Contains(s, `"`):
		return `"` + s + `"`
	default:
		return `'` + s + `'`
	}
}

// shellQuote quotes a word for a POSIX shell.
func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
