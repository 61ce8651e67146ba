//! What operators see: metrics, liveness, readiness, on one small HTTP endpoint.

use crate::handler::PoolUse;
use anyhow::{Context, Result};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::core::Collector;
use prometheus::local::LocalHistogram;
use prometheus::proto::MetricFamily;
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;

/// Upper bounds of the histograms' buckets, in seconds: 10 µs to 60 s.
pub(crate) const BUCKETS: &[f64] = &[
    1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0, 2.0, 5.0, 10.0,
    30.0, 60.0,
];

/// Longest wait for an operator's request to arrive.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The host's metrics. Labels are bounded: none comes from a message or a guest.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    /// Settled messages by `outcome` (verdict, duplicate, retry, dead, returned) and `reason`.
    messages: IntCounterVec,
    queue_wait: Histogram,
    instantiate: Histogram,
    guest: Histogram,
    publish: Histogram,
    ack: Histogram,
    end_to_end: Histogram,
    /// Instances alive now.
    pub slots_in_use: IntGauge,
    /// Messages fetched and not yet settled.
    pub in_flight: IntGauge,
    /// Guests in the slow lane now.
    pub slow_lane: IntGauge,
    /// Guests that computed for longer than their turn and went to the slow lane.
    pub slow_guests: IntCounter,
    /// Attempts to store a verdict or dead letter that failed and are repeated.
    pub store_failures: IntCounter,
    /// Messages stored where they wait for a delivery that is due late.
    pub parked: IntCounter,
    /// Messages of the stream not yet delivered, by the server's count.
    pub consumer_pending: IntGauge,
    /// Messages delivered and not yet settled, by the server's count, over all hosts.
    pub consumer_ack_pending: IntGauge,
    /// Dead letters of this consumer that are stored now.
    pub dead_letters: IntGauge,
    last_settled: Gauge,
    component_loads: IntCounterVec,
    component: Arc<dyn Fn() -> Component + Send + Sync>,
    slots: IntGauge,
    pool_instances: IntGauge,
    pool_kept: IntGauge,
}

/// What the metrics tell of the component that runs.
pub struct Component {
    /// Names it.
    pub digest: Arc<str>,
    /// Most instances alive at the same time.
    pub slots: u32,
    /// What its pools hold, if it has any.
    pub pool_use: Option<PoolUse>,
}

impl Metrics {
    /// Registers all metrics, with what does not change while the host runs; asks for the `component` whenever they are
    /// read.
    ///
    /// # Errors
    /// None in practice: the names are fixed.
    pub fn new(component: impl Fn() -> Component + Send + Sync + 'static) -> Result<Self> {
        let registry = Registry::new();
        let histogram = |name: &str, help: &str| -> Result<Histogram> {
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(BUCKETS.to_vec()))?;
            registry.register(Box::new(histogram.clone()))?;
            Ok(histogram)
        };
        let gauge = |name: &str, help: &str| -> Result<IntGauge> {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let messages = IntCounterVec::new(
            Opts::new("mailroom_messages_total", "Settled messages by outcome and reason."),
            &["outcome", "reason"],
        )?;
        registry.register(Box::new(messages.clone()))?;
        let store_failures = IntCounter::new(
            "mailroom_store_failures_total",
            "Failed attempts to store a verdict or dead letter; each is repeated.",
        )?;
        registry.register(Box::new(store_failures.clone()))?;
        let parked = IntCounter::new(
            "mailroom_parked_total",
            "Retries stored in the stream of parked messages, where they wait for their time.",
        )?;
        registry.register(Box::new(parked.clone()))?;
        let slow_guests = IntCounter::new(
            "mailroom_slow_guests_total",
            "Guests that computed for longer than their turn and went to the slow lane.",
        )?;
        registry.register(Box::new(slow_guests.clone()))?;
        let last_settled = Gauge::new(
            "mailroom_last_settled_timestamp_seconds",
            "When a message was last settled, in seconds since 1970; 0 before the first.",
        )?;
        registry.register(Box::new(last_settled.clone()))?;
        let component_loads = IntCounterVec::new(
            Opts::new("mailroom_component_loads_total", "Loads of a component while the host runs, by outcome."),
            &["outcome"],
        )?;
        for outcome in ["replaced", "unchanged", "refused"] {
            component_loads.with_label_values(&[outcome]);
        }
        registry.register(Box::new(component_loads.clone()))?;
        let build = IntGaugeVec::new(Opts::new("mailroom_build_info", "The host's version; always 1."), &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        registry.register(Box::new(build))?;
        Ok(Self {
            slots: gauge("mailroom_slots", "Most instances alive at the same time.")?,
            queue_wait: histogram("mailroom_queue_wait_seconds", "From arrival in the host to its first slot.")?,
            instantiate: histogram("mailroom_instantiate_seconds", "Making the instance.")?,
            guest: histogram("mailroom_guest_seconds", "The guest's run, waiting included.")?,
            publish: histogram("mailroom_publish_seconds", "Storing the verdict or dead letter, PubAck included.")?,
            ack: histogram("mailroom_ack_seconds", "Handing the acknowledgement to the connection.")?,
            end_to_end: histogram(
                "mailroom_end_to_end_seconds",
                "From the stream's timestamp of the message to its settlement.",
            )?,
            slots_in_use: gauge("mailroom_slots_in_use", "Instances alive now.")?,
            in_flight: gauge("mailroom_in_flight", "Messages fetched and not yet settled.")?,
            slow_lane: gauge("mailroom_slow_lane", "Guests in the slow lane now.")?,
            pool_instances: gauge("mailroom_pool_instances", "Component instances in the allocator's pool now.")?,
            pool_kept: gauge(
                "mailroom_pool_kept_bytes",
                "Memory of free slots that stays mapped for the next instances.",
            )?,
            dead_letters: gauge("mailroom_dead_letters", "Messages in the stream of dead letters now.")?,
            consumer_pending: gauge("mailroom_consumer_pending", "Messages not yet delivered to any host.")?,
            consumer_ack_pending: gauge(
                "mailroom_consumer_ack_pending",
                "Messages delivered and not yet settled, over all hosts.",
            )?,
            messages,
            store_failures,
            parked,
            slow_guests,
            last_settled,
            component_loads,
            component: Arc::new(component),
            registry,
        })
    }

    /// Adds further metrics.
    ///
    /// # Errors
    /// There are others with the same name.
    pub fn add(&self, others: impl IntoIterator<Item = Box<dyn Collector>>) -> Result<()> {
        others.into_iter().try_for_each(|other| Ok(self.registry.register(other)?))
    }

    /// Counts a message that left its stream without having come to a shard.
    pub fn settled(&self, outcome: &str, reason: &str) {
        self.messages.with_label_values(&[outcome, reason]).inc();
    }

    /// Counts that a component was loaded while the host runs: `replaced`, `unchanged` or `refused`.
    pub fn component_load(&self, outcome: &str) {
        self.component_loads.with_label_values(&[outcome]).inc();
    }

    /// All of them in Prometheus' text format.
    ///
    /// # Errors
    /// None in practice: the names are fixed.
    pub fn text(&self) -> Result<Vec<u8>> {
        let Component { digest, slots, pool_use } = (self.component)();
        self.slots.set(slots.into());
        if let Some(PoolUse { instances, kept_bytes }) = pool_use {
            self.pool_instances.set(i64::try_from(instances).unwrap_or(i64::MAX));
            self.pool_kept.set(i64::try_from(kept_bytes).unwrap_or(i64::MAX));
        }
        // Made anew each time: there is one component, and none before it.
        let info = IntGaugeVec::new(
            Opts::new("mailroom_component_info", "The component that runs, by its digest; always 1."),
            &["digest"],
        )?;
        info.with_label_values(&[&digest]).set(1);
        encode(&[self.registry.gather(), info.collect()].concat())
    }
}

/// Metrics in Prometheus' text format.
///
/// # Errors
/// A metric without a name or a value.
pub fn encode(metrics: &[MetricFamily]) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    TextEncoder::new().encode(metrics, &mut text)?;
    Ok(text)
}

/// One shard's share of the metrics: counted without contention, handed over by [`Stages::flush`].
pub struct Stages {
    metrics: Metrics,
    queue_wait: LocalHistogram,
    instantiate: LocalHistogram,
    guest: LocalHistogram,
    publish: LocalHistogram,
    ack: LocalHistogram,
    end_to_end: LocalHistogram,
    settled: RefCell<Vec<((&'static str, &'static str), u64)>>,
    in_flight: Cell<i64>,
    slots_in_use: Cell<i64>,
    slow_lane: Cell<i64>,
}

/// A stage of a message's way through the host.
#[derive(Debug, Clone, Copy)]
pub enum Stage {
    /// Waiting for a slot.
    QueueWait,
    /// Making the instance.
    Instantiate,
    /// The guest's run.
    Guest,
    /// Storing the verdict or the dead letter.
    Publish,
    /// Handing over the acknowledgement.
    Ack,
    /// From the stream's timestamp to the settlement.
    EndToEnd,
}

impl Stages {
    /// A share of `metrics`.
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            queue_wait: metrics.queue_wait.local(),
            instantiate: metrics.instantiate.local(),
            guest: metrics.guest.local(),
            publish: metrics.publish.local(),
            ack: metrics.ack.local(),
            end_to_end: metrics.end_to_end.local(),
            settled: RefCell::default(),
            in_flight: Cell::new(0),
            slots_in_use: Cell::new(0),
            slow_lane: Cell::new(0),
            metrics: metrics.clone(),
        }
    }

    /// Notes how long a stage took.
    pub fn observe(&self, stage: Stage, took: Duration) {
        let histogram = match stage {
            Stage::QueueWait => &self.queue_wait,
            Stage::Instantiate => &self.instantiate,
            Stage::Guest => &self.guest,
            Stage::Publish => &self.publish,
            Stage::Ack => &self.ack,
            Stage::EndToEnd => &self.end_to_end,
        };
        histogram.observe(took.as_secs_f64());
    }

    /// Counts a message that left the host.
    pub fn settled(&self, outcome: &'static str, reason: &'static str) {
        let mut settled = self.settled.borrow_mut();
        match settled.iter_mut().find(|(labels, _)| *labels == (outcome, reason)) {
            Some((_, count)) => *count += 1,
            None => settled.push(((outcome, reason), 1)),
        }
    }

    /// The gauges and counters that are shared by all shards.
    pub fn shared(&self) -> &Metrics {
        &self.metrics
    }

    /// Hands what was counted since the last call to the shared metrics, and this shard's part of the gauges.
    pub fn flush(&self, in_flight: usize, slots_in_use: usize, slow_lane: usize) {
        for (gauge, share, now) in [
            (&self.metrics.in_flight, &self.in_flight, in_flight),
            (&self.metrics.slots_in_use, &self.slots_in_use, slots_in_use),
            (&self.metrics.slow_lane, &self.slow_lane, slow_lane),
        ] {
            let now = i64::try_from(now).unwrap_or(i64::MAX);
            gauge.add(now - share.replace(now));
        }
        for histogram in [&self.queue_wait, &self.instantiate, &self.guest, &self.publish, &self.ack, &self.end_to_end]
        {
            histogram.flush();
        }
        let settled = std::mem::take(&mut *self.settled.borrow_mut());
        if !settled.is_empty() {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            self.metrics.last_settled.set(now.as_secs_f64());
        }
        for ((outcome, reason), count) in settled {
            self.metrics.messages.with_label_values(&[outcome, reason]).inc_by(count);
        }
    }
}

/// Whether the host can do its work: every condition has to hold.
#[derive(Debug, Clone, Default)]
pub struct Health(Arc<Mutex<Vec<Condition>>>);

/// One thing that has to be so for the host to be ready.
#[derive(Debug, Clone)]
pub struct Condition {
    missing: Arc<str>,
    met: Arc<AtomicBool>,
}

impl Health {
    /// Adds a condition, not met at first. `missing` says what is wrong while it is not.
    pub fn condition(&self, missing: &str) -> Condition {
        let condition = Condition { missing: missing.into(), met: Arc::default() };
        self.conditions().push(condition.clone());
        condition
    }

    /// What is missing, in the order the conditions were added; empty when the host is ready.
    pub fn missing(&self) -> Vec<String> {
        let conditions = self.conditions();
        conditions
            .iter()
            .filter(|condition| !condition.is_met())
            .map(|condition| condition.missing.to_string())
            .collect()
    }

    fn conditions(&self) -> std::sync::MutexGuard<'_, Vec<Condition>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Condition {
    /// Says whether the condition holds. True if that is news.
    pub fn set(&self, met: bool) -> bool {
        self.met.swap(met, Ordering::Relaxed) != met
    }

    /// Whether the condition holds.
    pub fn is_met(&self) -> bool {
        self.met.load(Ordering::Relaxed)
    }
}

/// The endpoint, bound and not yet serving.
pub struct Admin {
    listener: TcpListener,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Admin {
    /// Binds `address`.
    ///
    /// # Errors
    /// The address is taken or not this machine's.
    pub async fn bind(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address).await.with_context(|| {
            format!("listen on {address} for the admin endpoint; choose another --listen, or `--listen none`")
        })?;
        let address = listener.local_addr().context("read the admin endpoint's address")?;
        Ok(Self { listener, address })
    }

    /// Serves `/metrics`, which is what `metrics` says, `/livez` and `/readyz` until the future is dropped.
    pub async fn serve(self, metrics: impl Fn() -> Result<Vec<u8>> + Clone + Send + Sync + 'static, health: Health) {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(err) => {
                    tracing::warn!("admin endpoint: accept: {err}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (metrics, health) = (metrics.clone(), health.clone());
            connections.spawn(async move {
                let service = hyper::service::service_fn(move |request| {
                    let response = respond(&request, &metrics, &health);
                    async move { Ok::<_, std::convert::Infallible>(response) }
                });
                // A client that goes away or sends no HTTP is its own problem.
                let _ = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(REQUEST_TIMEOUT)
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
            while connections.try_join_next().is_some() {}
        }
    }
}

fn respond(
    request: &Request<Incoming>,
    metrics: impl Fn() -> Result<Vec<u8>>,
    health: &Health,
) -> Response<Full<Bytes>> {
    let text = "text/plain; charset=utf-8";
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return response(StatusCode::METHOD_NOT_ALLOWED, text, "GET /metrics, /livez or /readyz\n".into());
    }
    match request.uri().path() {
        "/livez" => response(StatusCode::OK, text, "alive\n".into()),
        "/readyz" => match health.missing() {
            missing if missing.is_empty() => response(StatusCode::OK, text, "ready\n".into()),
            missing => response(StatusCode::SERVICE_UNAVAILABLE, text, (missing.join("\n") + "\n").into()),
        },
        "/metrics" => match metrics() {
            Ok(metrics) => response(StatusCode::OK, prometheus::TEXT_FORMAT, metrics.into()),
            Err(err) => response(StatusCode::INTERNAL_SERVER_ERROR, text, format!("{err:#}\n").into()),
        },
        _ => response(StatusCode::NOT_FOUND, text, "GET /metrics, /livez or /readyz\n".into()),
    }
}

fn response(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_ready_when_every_condition_is_met() {
        let health = Health::default();
        let (first, second) = (health.condition("no connection"), health.condition("no consumer"));
        assert_eq!(health.missing(), ["no connection", "no consumer"]);
        assert!(first.set(true));
        assert!(!first.set(true));
        assert_eq!(health.missing(), ["no consumer"]);
        second.set(true);
        assert!(health.missing().is_empty());
        second.set(false);
        assert_eq!(health.missing(), ["no consumer"]);
    }

    #[test]
    fn counts_reach_the_text_when_flushed() -> Result<()> {
        let metrics = Metrics::new(|| Component { digest: "sha256:00".into(), slots: 4, pool_use: None })?;
        let stages = Stages::new(&metrics);
        stages.settled("verdict", "");
        stages.settled("verdict", "");
        stages.observe(Stage::Guest, Duration::from_millis(3));
        stages.flush(3, 2, 1);
        stages.flush(2, 0, 0);
        let text = String::from_utf8(metrics.text()?)?;
        for line in [
            "mailroom_messages_total{outcome=\"verdict\",reason=\"\"} 2",
            "mailroom_guest_seconds_count 1",
            "mailroom_component_info{digest=\"sha256:00\"} 1",
            "mailroom_slots 4",
            "mailroom_in_flight 2",
            "mailroom_slots_in_use 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        Ok(())
    }
}
