//! What guests did with what they were granted, in figures. Labels are bounded: none comes from a guest.

use crate::admin::BUCKETS;
use prometheus::core::Collector;
use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounterVec, Opts};
use std::time::{Duration, Instant};

/// Counts and times of calls.
#[derive(Debug, Clone)]
pub struct Usage {
    keyvalue_calls: IntCounterVec,
    keyvalue: HistogramVec,
    http_requests: IntCounterVec,
    http: Histogram,
}

impl Default for Usage {
    fn default() -> Self {
        Self::new().expect("the names of the metrics are fixed")
    }
}

impl Usage {
    fn new() -> prometheus::Result<Self> {
        let buckets = |name, help| HistogramOpts::new(name, help).buckets(BUCKETS.to_vec());
        Ok(Self {
            keyvalue_calls: IntCounterVec::new(
                Opts::new("mailroom_keyvalue_calls_total", "Calls of guests to wasi:keyvalue and claims that ended."),
                &["operation", "outcome"],
            )?,
            keyvalue: HistogramVec::new(
                buckets("mailroom_keyvalue_seconds", "Calls of guests to wasi:keyvalue and claims."),
                &["operation"],
            )?,
            http_requests: IntCounterVec::new(
                Opts::new("mailroom_http_requests_total", "Requests of guests by what came of them."),
                &["outcome"],
            )?,
            http: Histogram::with_opts(buckets(
                "mailroom_http_seconds",
                "Requests of guests, up to the end of the response.",
            ))?,
        })
    }

    /// The metrics of `wasi:keyvalue`.
    pub fn of_keyvalue(&self) -> [Box<dyn Collector>; 2] {
        [Box::new(self.keyvalue_calls.clone()), Box::new(self.keyvalue.clone())]
    }

    /// The metrics of `wasi:http`.
    pub fn of_http(&self) -> [Box<dyn Collector>; 2] {
        [Box::new(self.http_requests.clone()), Box::new(self.http.clone())]
    }

    /// Counts a call to `wasi:keyvalue` when it ends.
    pub(super) async fn keyvalue<T, E>(
        &self,
        operation: &'static str,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let started = Instant::now();
        let result = call.await;
        let outcome = if result.is_ok() { "ok" } else { "error" };
        self.keyvalue_calls.with_label_values(&[operation, outcome]).inc();
        self.keyvalue.with_label_values(&[operation]).observe(started.elapsed().as_secs_f64());
        result
    }

    /// Counts a request that has ended.
    pub(super) fn http_request(&self, outcome: &'static str, took: Duration) {
        self.http_requests.with_label_values(&[outcome]).inc();
        self.http.observe(took.as_secs_f64());
    }
}
