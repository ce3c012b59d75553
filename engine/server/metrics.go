package server

import (
	"context"
	"net/http"
	"time"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/server/jobs"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Metrics are what a server tells Prometheus.
type Metrics struct {
	registry *prometheus.Registry
	taken    *prometheus.CounterVec
	ended    *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	waiting  *prometheus.GaugeVec
	workers  prometheus.Gauge
}

// NewMetrics makes a set of them.
func NewMetrics() *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		taken: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "nnsight_jobs_submitted_total",
			Help: "Jobs that were taken into the queue."}, []string{"model"}),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "nnsight_jobs_ended_total",
			Help: "Jobs that workers of this process have ended."}, []string{"model", "state"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "nnsight_job_seconds",
			Help: "How long jobs ran.", Buckets: prometheus.ExponentialBuckets(0.001, 4, 10)}, []string{"model"}),
		waiting: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "nnsight_jobs_waiting",
			Help: "Jobs in the queue, those under way included."}, []string{"model"}),
		workers: prometheus.NewGauge(prometheus.GaugeOpts{Name: "nnsight_workers", Help: "Workers that were heard of lately."}),
	}
	m.registry.MustRegister(m.taken, m.ended, m.seconds, m.waiting, m.workers, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "nnsight_tensors", Help: "Tensors that this process holds."},
			func() float64 { return float64(aten.Live()) }))
	return m
}

// Done notes that a worker has ended a job: the Done of its options.
func (m *Metrics) Done(model string, state jobs.State, took time.Duration) {
	m.ended.WithLabelValues(model, string(state)).Inc()
	m.seconds.WithLabelValues(model).Observe(took.Seconds())
}

func (m *Metrics) submitted(model string) { m.taken.WithLabelValues(model).Inc() }

// handler answers Prometheus, with the queue as it is then.
func (m *Metrics) handler(s *Server) http.HandlerFunc {
	metrics := promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 2*time.Second)
		defer cancel()
		if names, err := s.store.Models(ctx); err == nil {
			for _, name := range names {
				if n, err := s.store.Depth(ctx, name); err == nil {
					m.waiting.WithLabelValues(name).Set(float64(n))
				}
			}
		}
		m.workers.Set(float64(len(s.workers())))
		metrics.ServeHTTP(w, r)
	}
}
