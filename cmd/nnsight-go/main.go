// Command nnsight-go serves Go programs that use the engine.
//
//	nnsight-go env    prints what Go needs in its environment to build with the engine
//
// The command itself uses no C, so that it can be run before any library is there.
package main

import (
	"fmt"
	"io"
	"os"
	"slices"
)

// subcommand does its work and gives the exit status.
type subcommand struct {
	about string
	run   func(args []string, stdout, stderr io.Writer) int
}

var subcommands = map[string]subcommand{
	"env": {"print what Go needs in its environment to build with the engine", runEnv},
}

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	if len(args) > 0 {
		if sub, ok := subcommands[args[0]]; ok {
			return sub.run(args[1:], stdout, stderr)
		}
		if args[0] == "help" || args[0] == "-h" || args[0] == "--help" {
			usage(stdout)
			return 0
		}
		fmt.Fprintf(stderr, "nnsight-go: no subcommand %q\n", args[0])
	}
	usage(stderr)
	return 2
}

func usage(w io.Writer) {
	fmt.Fprint(w, "usage: nnsight-go <subcommand> [flags]\n\n")
	names := make([]string, 0, len(subcommands))
	for name := range subcommands {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintf(w, "  %-8s %s\n", name, subcommands[name].about)
	}
}
