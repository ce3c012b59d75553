//go:build cgo

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/remote"
	"github.com/nnsight-go/nnsight-go/engine/server"
	"github.com/nnsight-go/nnsight-go/engine/server/jobs"
	"github.com/nnsight-go/nnsight-go/engine/server/keys"
	"github.com/nnsight-go/nnsight-go/engine/server/work"
	"github.com/spf13/cobra"
)

func init() {
	subcommands["serve"] = subcommand{"serve models to remote traces", command(serveCommand)}
	subcommands["worker"] = subcommand{"run the jobs of a server that is elsewhere", command(workerCommand)}
	subcommands["key"] = subcommand{"make, list and revoke API keys", command(keyCommand)}
}

// command runs one of cobra's as a subcommand.
func command(make func() *cobra.Command) func([]string, io.Writer, io.Writer) int {
	return func(args []string, stdout, stderr io.Writer) int {
		c, own := &cobra.Command{Use: "nnsight-go", SilenceUsage: true, SilenceErrors: true}, make()
		c.AddCommand(own)
		c.SetArgs(append([]string{own.Name()}, args...))
		c.SetOut(stdout)
		c.SetErr(stderr)
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		if err := c.ExecuteContext(ctx); err != nil {
			fmt.Fprintln(stderr, "nnsight-go:", err)
			return 1
		}
		return 0
	}
}

// running is what serve and worker have in common.
type running struct {
	models   []string
	device   string
	dtype    string
	limits   remote.Limits
	seconds  time.Duration
	memory   int64
	mostLine float64
	drain    time.Duration
	replicas int
	keep     time.Duration
	storage  int64
}

func (r *running) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringArrayVar(&r.models, "model", nil, "a model, `NAME or NAME=DIRECTORY`; may be given several times")
	f.StringVar(&r.device, "device", "", "where models compute: cpu, cuda:0")
	f.StringVar(&r.dtype, "dtype", "", "dtype of the parameters; that of the checkpoint, if not given")
	f.IntVar(&r.limits.Tokens, "max-tokens", 1<<16, "tokens of one job, those it generates included")
	f.IntVar(&r.limits.NewTokens, "max-new-tokens", 4096, "tokens that a generation adds to each row")
	f.Int64Var(&r.limits.Output, "max-output", 256<<20, "bytes of a result")
	f.DurationVar(&r.seconds, "max-time", 5*time.Minute, "how long a job may run")
	f.Float64Var(&r.limits.Work, "max-work", 1e16, "multiplications that a job may need, estimated before it runs; 0 for no limit")
	f.Float64Var(&r.mostLine, "max-line", 1e13, "multiplications that one line of a job may need, which cannot be interrupted; 0 for no limit")
	f.Int64Var(&r.memory, "max-memory", 8<<30, "bytes of tensors that jobs may take beside the weights, on the CPU; negative for no limit")
	f.DurationVar(&r.drain, "drain", 30*time.Second, "how long jobs under way may go on when the process is to end")
	f.IntVar(&r.replicas, "replicas", 1, "copies of everything, in a cluster of NATS servers")
	f.DurationVar(&r.keep, "keep", 24*time.Hour, "how long jobs and results are kept")
	f.Int64Var(&r.storage, "max-storage", 0, "bytes on disk of requests, of uploads and of results, each; 0 for as much as there is")
}

// open opens the models, and closes those that it has opened where one fails.
func (r *running) open() (models map[string]*engine.Model, closeAll func(), err error) {
	models = map[string]*engine.Model{}
	closeAll = func() {
		for _, m := range models {
			_ = m.Close()
		}
	}
	for _, given := range r.models {
		name, path, found := strings.Cut(given, "=")
		if !found {
			path = name
		}
		m, err := engine.Open(path, engine.Options{Device: r.device, DType: r.dtype, Load: true})
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		models[name] = m
	}
	return models, closeAll, nil
}

func (r *running) store(ctx context.Context, nc *nats.Conn) (*jobs.Store, error) {
	return jobs.Open(ctx, nc, jobs.Options{Keep: r.keep, Replicas: r.replicas, Storage: r.storage})
}

// work runs jobs until front, which does what is done beside, ends.
func (r *running) work(ctx context.Context, store *jobs.Store, models map[string]*engine.Model, o work.Options, front func() error) error {
	if err := aten.CapMemory(r.memory); err != nil {
		return err
	}
	o.Limits, o.Time, o.Line = r.limits, r.seconds, r.mostLine
	o.Limits.Memory = max(r.memory, 0)
	w, err := work.Start(ctx, store, models, o)
	if err != nil {
		return err
	}
	defer func() {
		last, cancel := context.WithTimeout(context.Background(), r.drain)
		defer cancel()
		w.Close(last)
	}()
	return front()
}

func serveCommand() *cobra.Command {
	var r running
	var listen, data, natsURL, natsListen, natsToken, cert, certKey, audit string
	var open bool
	var body int64
	var rate float64
	c := &cobra.Command{
		Use:   "serve --model NAME[=DIRECTORY] ...",
		Short: "Serve models to remote traces",
		Long: "Serve models to remote traces: model.trace(..., remote=\"http://...\") in Python.\n" +
			"Jobs and results lie in the data directory, and are there again after a restart.",
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, log := c.Context(), slog.New(slog.NewTextHandler(c.ErrOrStderr(), nil))
			known := keys.Open(filepath.Join(data, "keys.json"))
			all, err := known.All()
			if err != nil {
				return err
			}
			if open {
				known = nil
			} else if len(all) == 0 {
				if !loopback(listen) {
					return fault.New(fault.Remote, "there are no API keys in %s, so anybody could use %s", data, listen).
						WithHint("Make one: `nnsight-go key create --data %s NAME`. Or say --open, to let everybody in.", data)
				}
				log.Warn("there are no API keys: everybody on this machine is let in")
			}
			models, closeAll, err := r.open()
			if err != nil {
				return err
			}
			defer closeAll()
			var nc *nats.Conn
			if natsURL != "" {
				nc, err = jobs.Connect(natsURL)
			} else {
				host, port, e := hostPort(natsListen)
				if e != nil {
					return e
				}
				embedded, e := jobs.Embed(filepath.Join(data, "queue"), host, port, natsToken)
				if e != nil {
					return e
				}
				defer embedded.Close()
				if host != "" {
					log.Info("workers connect to", "nats", embedded.URL())
				}
				nc, err = embedded.Connect(natsToken)
			}
			if err != nil {
				return err
			}
			defer nc.Close()
			store, err := r.store(ctx, nc)
			if err != nil {
				return err
			}
			trail, closeTrail, err := appended(audit)
			if err != nil {
				return err
			}
			defer closeTrail()
			metrics := server.NewMetrics() // the server listens before there are workers, so that it hears of them
			handler, err := server.New(store, server.Options{Keys: known, Unlocked: len(all) == 0, Log: log, Body: body, Rate: rate, Audit: trail}, metrics)
			if err != nil {
				return err
			}
			return r.work(ctx, store, models, work.Options{Log: log, Done: metrics.Done}, func() error {
				return listenAndServe(ctx, listen, cert, certKey, handler, log)
			})
		},
	}
	r.flags(c)
	f := c.Flags()
	f.StringVar(&listen, "listen", "127.0.0.1:8418", "address to listen on")
	f.StringVar(&data, "data", "nnsight-data", "directory of jobs, results and keys")
	f.StringVar(&audit, "audit", "", "file that is told who asked for what, a line of JSON a request")
	f.BoolVar(&open, "open", false, "let everybody in, without a key")
	f.StringVar(&natsURL, "nats", "", "NATS servers of a cluster, in place of one inside this process")
	f.StringVar(&natsListen, "nats-listen", "", "address where workers of other processes reach the queue")
	f.StringVar(&natsToken, "nats-token", "", "token that they show")
	f.StringVar(&cert, "tls-cert", "", "certificate, for HTTPS")
	f.StringVar(&certKey, "tls-key", "", "its key")
	f.Int64Var(&body, "max-body", 256<<20, "bytes of a request, decompressed")
	f.Float64Var(&rate, "rate", 50, "jobs, and uploaded tensors, a second of one key; without keys there is no limit")
	c.MarkFlagsRequiredTogether("tls-cert", "tls-key")
	c.MarkFlagsMutuallyExclusive("nats", "nats-listen")
	return c
}

// appended opens a file to write to its end; without a path there is none.
func appended(path string) (w io.Writer, done func(), err error) {
	if path == "" {
		return nil, func() {}, nil
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, nil, err
	}
	return f, func() { _ = f.Close() }, nil
}

func workerCommand() *cobra.Command {
	var r running
	var url string
	c := &cobra.Command{
		Use:   "worker --nats URL --model NAME[=DIRECTORY] ...",
		Short: "Run the jobs of a server that is elsewhere",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, log := c.Context(), slog.New(slog.NewTextHandler(c.ErrOrStderr(), nil))
			if len(r.models) == 0 {
				return fault.New(fault.Remote, "a worker needs a model").WithHint("Say --model NAME or --model NAME=DIRECTORY.")
			}
			models, closeAll, err := r.open()
			if err != nil {
				return err
			}
			defer closeAll()
			nc, err := jobs.Connect(url)
			if err != nil {
				return err
			}
			defer nc.Close()
			store, err := r.store(ctx, nc)
			if err != nil {
				return err
			}
			return r.work(ctx, store, models, work.Options{Log: log}, func() error {
				log.Info("working", "models", r.models)
				<-ctx.Done()
				return nil
			})
		},
	}
	r.flags(c)
	c.Flags().StringVar(&url, "nats", "nats://127.0.0.1:4222", "NATS servers: of `nnsight-go serve --nats-listen`, or a cluster")
	return c
}

func keyCommand() *cobra.Command {
	var data string
	c := &cobra.Command{Use: "key", Short: "Make, list and revoke API keys"}
	c.PersistentFlags().StringVar(&data, "data", "nnsight-data", "the server's data directory")
	store := func() *keys.Store { return keys.Open(filepath.Join(data, "keys.json")) }
	var priority string
	var rate float64
	var days int
	var limits jobs.Limits
	create := &cobra.Command{
		Use: "create NAME", Short: "Make a key for somebody, and print it: it cannot be shown again", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			k := keys.Key{Name: args[0], Priority: priority, Rate: rate, Limits: limits}
			if limits.Work < 0 || limits.Memory < 0 || limits.Output < 0 {
				return fault.New(fault.Remote, "a limit is not negative").WithHint("0 is that of the server.")
			}
			if p := jobs.Priority(priority); p != jobs.High && p != jobs.Normal && p != jobs.Low {
				return fault.New(fault.Remote, "%q is no priority", priority).WithHint("There are high, normal and low.")
			}
			if days > 0 {
				end := time.Now().UTC().AddDate(0, 0, days).Truncate(time.Second)
				k.Expires = &end
			}
			text, made, err := store().Create(k)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.ErrOrStderr(), "key %s of %s:\n", made.ID, made.Name)
			fmt.Fprintln(c.OutOrStdout(), text)
			return nil
		},
	}
	create.Flags().StringVar(&priority, "priority", "normal", "whose jobs come first: high, normal, low")
	create.Flags().Float64Var(&rate, "rate", 0, "jobs a second; 0 for what the server lets everybody have")
	create.Flags().Float64Var(&limits.Work, "max-work", 0, "multiplications of one job; 0 for what the server lets everybody have")
	create.Flags().Int64Var(&limits.Memory, "max-memory", 0, "bytes of tensors that one job takes at once; 0 likewise")
	create.Flags().Int64Var(&limits.Output, "max-output", 0, "bytes of a result; 0 likewise")
	create.Flags().IntVar(&days, "days", 0, "how long it is good for; 0 for ever")
	list := &cobra.Command{
		Use: "list", Short: "List the keys", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			all, err := store().All()
			if err != nil {
				return err
			}
			for i := range all {
				state := "good"
				if all[i].Revoked != nil {
					state = "revoked"
				} else if !all[i].Usable(time.Now()) {
					state = "expired"
				}
				fmt.Fprintf(c.OutOrStdout(), "%s  %-8s %-8s %s  %s%s\n", all[i].ID, state, all[i].Priority,
					all[i].Created.Format(time.DateOnly), all[i].Name, limitsText(all[i].Limits))
			}
			return nil
		},
	}
	revoke := &cobra.Command{
		Use: "revoke ID", Short: "End a key, from now on", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error { return store().Revoke(args[0]) },
	}
	c.AddCommand(create, list, revoke)
	return c
}

// limitsText shows the limits of a key that it has.
func limitsText(l jobs.Limits) (out string) {
	if l.Work > 0 {
		out += fmt.Sprintf("  max-work=%g", l.Work)
	}
	if l.Memory > 0 {
		out += fmt.Sprintf("  max-memory=%d", l.Memory)
	}
	if l.Output > 0 {
		out += fmt.Sprintf("  max-output=%d", l.Output)
	}
	return out
}

// listenAndServe answers until ctx ends, and then lets those that have asked have their answers.
func listenAndServe(ctx context.Context, address, cert, key string, h http.Handler, log *slog.Logger) error {
	s := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 5 * time.Minute, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 64 << 10, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return fault.New(fault.Remote, "the server cannot listen on %s: %v", address, err)
	}
	scheme := "http"
	ended := make(chan error, 1)
	if cert != "" {
		scheme = "https"
		go func() { ended <- s.ServeTLS(l, cert, key) }()
	} else {
		go func() { ended <- s.Serve(l) }()
	}
	log.Info("listening", "url", scheme+"://"+l.Addr().String())
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	last, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := s.Shutdown(last); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// loopback reports whether an address is reached from this machine alone.
func loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// hostPort splits an address; an empty one is no address.
func hostPort(address string) (string, int, error) {
	if address == "" {
		return "", 0, nil
	}
	a, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return "", 0, fault.New(fault.Remote, "%q is no address to listen on: %v", address, err)
	}
	host := a.IP.String()
	if a.IP == nil {
		host = "0.0.0.0"
	}
	if a.Port == 0 {
		a.Port = -1 // NATS's word for any
	}
	return host, a.Port, nil
}
