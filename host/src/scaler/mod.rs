//! `host scaler`: tells KEDA how many hosts there should be, for any number of ScaledObjects.
//!
//! KEDA calls ([`external_scaler`]); a [`trigger`]'s metadata says which [`consumer`] is meant; that asks the server, or
//! waits for the first message; [`rate`] makes a number of replicas of it. Nothing is ever guessed: where the server does
//! not answer, KEDA gets an error, and keeps what it has.

mod consumer;
mod rate;
mod serve;
mod trigger;

use self::consumer::{News, Trouble, Watched};
use self::rate::replicas;
use self::serve::{Grpc, Tls, TlsArgs};
use self::trigger::Trigger;
use crate::admin::{Admin, Condition, Health, encode};
use crate::cli::runtime;
use crate::host::{connect_patiently, is_broken_off};
use crate::identity::Losses;
use crate::log::LogArgs;
use crate::nats::{ConnectError, Nats, NatsArgs};
use crate::parking::Mover;
use crate::run::{Listen, Signals};
use anyhow::Result;
use async_nats::jetstream::Context;
use external_scaler::external_scaler_server::{ExternalScaler, ExternalScalerServer};
use external_scaler::{
    GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IsActiveResponse, MetricValue, ScaledObjectRef,
};
use futures::stream::{self, BoxStream, StreamExt as _};
use hyper::Request as HttpRequest;
use hyper::body::Incoming;
use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::select;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::codegen::Service as _;
use tonic::server::NamedService;
use tonic::{Code, Request, Response, Status};
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};

/// Consumers that are remembered, each with its activation lag.
const CONSUMERS_MAX: usize = 4096;

/// How long a consumer that nobody asks for is remembered.
const CONSUMER_IDLE_MAX: Duration = Duration::from_secs(60 * 60);

/// Longest wait for an answer of JetStream's.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);

/// How often it is looked after the connection.
const BEAT: Duration = Duration::from_secs(1);

/// Longest wait for watchers to be removed when it stops.
const STOP_MAX: Duration = Duration::from_secs(5);

/// Tell KEDA how many hosts there should be: an external scaler
#[derive(Debug, clap::Args)]
#[command(after_help = "A trigger of type `external-push` names this scaler and a consumer:
  metadata:
    scalerAddress: mailroom-scaler.mail:9466
    stream: MAIL
    consumer: triage
    lagThreshold: \"1000\"            messages for each replica
    activationLagThreshold: \"0\"     messages that start no replica yet
    targetDrainSeconds: \"60\"        replicas by time instead: be done with all there is in a minute
    maxInFlight: \"256\"              of one replica: --max-in-flight times --shards

SIGTERM and SIGINT end open streams in good order. Exit codes: 0 stopped, 1 could not start or go
on, 2 wrong usage.")]
pub struct ScalerArgs {
    /// Where KEDA calls: an address with a port
    #[arg(long, value_name = "ADDRESS", env = "MAILROOM_GRPC_LISTEN", default_value = "127.0.0.1:9466")]
    grpc_listen: SocketAddr,

    #[command(flatten)]
    tls: TlsArgs,

    /// Where to serve /metrics, /livez and /readyz; `none` for nowhere
    #[arg(long, value_name = "ADDRESS", env = "MAILROOM_LISTEN", default_value = "127.0.0.1:9464")]
    listen: Listen,

    /// Stream in which retries wait that are due late: on servers older than 2.12 the scaler brings them back, too
    #[arg(long, value_name = "NAME", env = "MAILROOM_PARKED_STREAM", default_value = "PARKED")]
    parked_stream: String,

    #[command(flatten)]
    nats: NatsArgs,

    #[command(flatten)]
    log: LogArgs,
}

impl ScalerArgs {
    /// Carries out `host scaler`: returns when it was told to stop.
    ///
    /// # Errors
    /// Anything wrong with the configuration, an address that is taken, a server that refuses the login; each with its
    /// remedy.
    pub fn execute(self) -> Result<ExitCode> {
        let _log = self.log.start()?;
        let tls = self.tls.resolve()?;
        let nats = self.nats.resolve()?;
        let runtime = runtime()?;
        let _entered = runtime.enter();
        let mut signals = Signals::new()?;
        runtime.block_on(run(self.grpc_listen, tls, self.listen, nats, self.parked_stream, &mut signals))?;
        Ok(ExitCode::SUCCESS)
    }
}

async fn run(
    address: SocketAddr,
    tls: Option<Tls>,
    listen: Listen,
    nats: Nats,
    parked_stream: String,
    signals: &mut Signals,
) -> Result<()> {
    let health = Health::default();
    let metrics = Metrics::new()?;
    let server = Arc::new(Server {
        jetstream: Mutex::default(),
        connected: health.condition("no connection to NATS"),
        started: Instant::now(),
        stop: CancellationToken::new(),
        tasks: TaskTracker::new(),
        metrics: metrics.clone(),
        nats,
    });
    if let Listen::At(address) = listen {
        let admin = Admin::bind(address).await?;
        tracing::info!(url = format!("http://{}", admin.address), "admin endpoint");
        tokio::spawn(admin.serve(move || encode(&metrics.registry.gather()), health));
    }
    let is_encrypted = tls.is_some();
    let grpc = Grpc::bind(address, tls).await?;
    tracing::info!(address = %grpc.address, tls = is_encrypted, server = server.nats.servers(), "scaler endpoint");

    let reporter = HealthReporter::new();
    let router = Router {
        scaler: ExternalScalerServer::new(Scaler { server: Arc::clone(&server), consumers: Mutex::default() }),
        health: HealthServer::new(HealthService::from_health_reporter(reporter.clone())),
    };
    let serving = grpc.serve(move |request| router.clone().route(request), server.stop.clone());
    let mut serving = tokio::spawn(serving);
    select! {
        connection = server.keep_connected(&reporter, &parked_stream) => connection?,
        name = signals.next() => tracing::info!("{name}: stopping"),
    }
    report(&reporter, ServingStatus::NotServing).await;
    server.stop.cancel();
    server.tasks.close();
    select! {
        _ = async { tokio::join!(timeout(STOP_MAX, server.tasks.wait()), &mut serving) } => tracing::info!("stopped"),
        name = signals.next() => {
            tracing::warn!("{name} again: stopping at once");
            std::process::exit(signals.exit_code());
        }
    }
    Ok(())
}

/// What the health service says, of the whole and of its one service.
async fn report(reporter: &HealthReporter, status: ServingStatus) {
    for service in ["", ExternalScalerServer::<Scaler>::NAME] {
        reporter.set_service_status(service, status).await;
    }
}

/// The connection to NATS, and what all consumers share.
struct Server {
    nats: Nats,
    jetstream: Mutex<Option<Context>>,
    connected: Condition,
    started: Instant,
    /// From now on nothing is waited for.
    stop: CancellationToken,
    /// Those that wait for messages.
    tasks: TaskTracker,
    metrics: Metrics,
}

impl Server {
    /// JetStream, while there is a connection.
    fn jetstream(&self) -> Option<Context> {
        let jetstream = self.jetstream.lock().unwrap_or_else(PoisonError::into_inner).clone();
        jetstream.filter(|_| self.connected.is_met())
    }

    fn api_prefix(&self) -> &str {
        self.nats.api_prefix()
    }

    fn since_start(&self) -> Duration {
        self.started.elapsed()
    }

    /// Connects, as often as it takes, and looks after the connection and what a [`Mover`] does by it.
    ///
    /// # Errors
    /// The server refuses the credentials.
    async fn keep_connected(&self, reporter: &HealthReporter, parked_stream: &str) -> Result<(), ConnectError> {
        report(reporter, ServingStatus::NotServing).await;
        let losses = Arc::<Losses>::default();
        loop {
            let connected = self.connected.clone();
            let connecting = connect_patiently(&self.nats, "mailroom scaler", losses.clone(), connected, &self.stop);
            let Some(client) = connecting.await? else { return Ok(()) };
            let jetstream = self.nats.jetstream(client.clone(), REQUEST_TIMEOUT);
            *self.jetstream.lock().unwrap_or_else(PoisonError::into_inner) = Some(jetstream.clone());
            let mut moving = JoinSet::new();
            moving.spawn(Mover::new(jetstream, parked_stream.to_owned()).run());
            let mut reported = None;
            // A message whose headers the client cannot read breaks it off, see `unreadable`.
            while !is_broken_off(&client) {
                let is_connected = self.connected.is_met();
                if reported != Some(is_connected) {
                    report(reporter, if is_connected { ServingStatus::Serving } else { ServingStatus::NotServing })
                        .await;
                    reported = Some(is_connected);
                }
                sleep(BEAT).await;
            }
            self.connected.set(false);
            losses.add();
            tracing::error!("the NATS client broke off; connecting anew");
        }
    }
}

/// Hands calls to the service they are for.
#[derive(Clone)]
struct Router {
    scaler: ExternalScalerServer<Scaler>,
    health: HealthServer<HealthService>,
}

impl Router {
    async fn route(mut self, request: HttpRequest<Incoming>) -> hyper::Response<Body> {
        let service = request.uri().path().split('/').nth(1).unwrap_or_default();
        let answered = if service == ExternalScalerServer::<Scaler>::NAME {
            self.scaler.call(request).await
        } else if service == HealthServer::<HealthService>::NAME {
            self.health.call(request).await
        } else {
            Ok(Status::unimplemented(format!("no service {service:?} here")).into_http())
        };
        match answered {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }
}

/// KEDA's calls.
struct Scaler {
    server: Arc<Server>,
    /// By stream, consumer and activation lag.
    consumers: Mutex<HashMap<(String, String, u64), Arc<Watched>>>,
}

impl Scaler {
    /// The consumer that a trigger is about: the same for all that ask the same.
    fn watched(&self, trigger: &Trigger) -> Result<Arc<Watched>, Status> {
        let mut consumers = self.consumers.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (trigger.stream.clone(), trigger.consumer.clone(), trigger.activation);
        if let Some(watched) = consumers.get(&key) {
            return Ok(Arc::clone(watched));
        }
        consumers.retain(|_, watched| Arc::strong_count(watched) > 1 || watched.idle() < CONSUMER_IDLE_MAX);
        if consumers.len() >= CONSUMERS_MAX {
            return Err(Status::resource_exhausted(format!(
                "this scaler looks after {CONSUMERS_MAX} consumers already; run another one"
            )));
        }
        let (stream, consumer, activation) = key.clone();
        let watched = Arc::new(Watched::new(Arc::clone(&self.server), stream, consumer, activation));
        consumers.insert(key, Arc::clone(&watched));
        Ok(watched)
    }

    /// Carries out one call and counts how it ended.
    async fn call<T>(
        &self,
        method: &str,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<Response<T>, Status> {
        let result = call.await;
        let code = result.as_ref().map_or_else(Status::code, |_| Code::Ok);
        self.server.metrics.requests.with_label_values(&[method, &format!("{code:?}")]).inc();
        if let Err(status) = &result {
            tracing::debug!(method, code = ?code, "{}", status.message());
        }
        result.map(Response::new)
    }
}

impl From<Trouble> for Status {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Missing(reason) => Self::not_found(reason),
            Trouble::Away(reason) => Self::unavailable(reason),
        }
    }
}

fn parse(object: &ScaledObjectRef) -> Result<Trigger, Status> {
    Trigger::parse(&object.scaler_metadata)
        .map_err(|err| Status::invalid_argument(format!("{}/{}: {err:#}", object.namespace, object.name)))
}

#[tonic::async_trait]
impl ExternalScaler for Scaler {
    async fn is_active(&self, request: Request<ScaledObjectRef>) -> Result<Response<IsActiveResponse>, Status> {
        let call = async {
            let trigger = parse(request.get_ref())?;
            let look = self.watched(&trigger)?.look().await?;
            Ok(IsActiveResponse { result: look.is_active })
        };
        self.call("IsActive", call).await
    }

    type StreamIsActiveStream = BoxStream<'static, Result<IsActiveResponse, Status>>;

    /// Tells at once what is so, and then whatever changes. KEDA waits longer and longer before it asks again after a
    /// stream that ended with an error, so one goes on while the server is away; those who ask meanwhile get the error.
    async fn stream_is_active(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<Self::StreamIsActiveStream>, Status> {
        let call = async {
            let trigger = parse(request.get_ref())?;
            let watched = self.watched(&trigger)?;
            watched.look().await?;
            let (news, guard) = watched.listen();
            let count = Observed::new(&self.server.metrics.streams);
            let telling = Telling { news, told: None, stop: self.server.stop.clone(), _guard: guard, _count: count };
            Ok(stream::unfold(Some(telling), Telling::next).boxed())
        };
        self.call("StreamIsActive", call).await
    }

    async fn get_metric_spec(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<GetMetricSpecResponse>, Status> {
        let call = async { Ok(GetMetricSpecResponse { metric_specs: vec![parse(request.get_ref())?.spec()] }) };
        self.call("GetMetricSpec", call).await
    }

    async fn get_metrics(&self, request: Request<GetMetricsRequest>) -> Result<Response<GetMetricsResponse>, Status> {
        let call = async {
            let request = request.get_ref();
            let object = request.scaled_object_ref.as_ref();
            let trigger = parse(object.ok_or_else(|| Status::invalid_argument("no ScaledObject named"))?)?;
            let metric_name = trigger.metric_name();
            if request.metric_name != metric_name {
                return Err(Status::invalid_argument(format!(
                    "no metric {:?} here; GetMetricSpec names {metric_name}",
                    request.metric_name
                )));
            }
            let look = self.watched(&trigger)?.look().await?;
            let value = match trigger.drain {
                Some(drain) => replicas(look.lag, look.speed, trigger.places, drain, trigger.lag_threshold),
                None => look.lag as f64,
            };
            let value = MetricValue { metric_name, metric_value: value.ceil() as i64, metric_value_float: value };
            Ok(GetMetricsResponse { metric_values: vec![value] })
        };
        self.call("GetMetrics", call).await
    }
}

/// A stream on which KEDA is told whether there is something to do.
struct Telling {
    news: watch::Receiver<News>,
    told: Option<bool>,
    stop: CancellationToken,
    _guard: Arc<DropGuard>,
    _count: Observed,
}

impl Telling {
    /// Waits until there is something else to tell. Ends in good order when the scaler stops, so that KEDA asks
    /// another one soon, and with an error when there is no such consumer any more.
    async fn next(telling: Option<Self>) -> Option<(Result<IsActiveResponse, Status>, Option<Self>)> {
        let mut telling = telling?;
        loop {
            let news = telling.news.borrow_and_update().clone();
            match news {
                News::Active(result) if telling.told != Some(result) => {
                    telling.told = Some(result);
                    return Some((Ok(IsActiveResponse { result }), Some(telling)));
                }
                News::Missing(reason) => return Some((Err(Status::not_found(reason)), None)),
                News::Active(_) | News::Nothing => {}
            }
            select! {
                changed = telling.news.changed() => changed.ok()?,
                () = telling.stop.cancelled() => return None,
            }
        }
    }
}

/// The scaler's metrics. Labels are bounded: none comes from a trigger.
#[derive(Clone)]
struct Metrics {
    registry: Registry,
    /// Calls by `method` and `code`.
    requests: IntCounterVec,
    streams: IntGauge,
    watchers: IntGauge,
    activations: IntCounter,
    watcher_failures: IntCounter,
}

impl Metrics {
    fn new() -> Result<Self> {
        let registry = Registry::new();
        let requests = IntCounterVec::new(
            Opts::new("mailroom_scaler_requests_total", "Calls of KEDA's by method and gRPC status code."),
            &["method", "code"],
        )?;
        let streams = IntGauge::new("mailroom_scaler_streams", "Streams on which KEDA waits for activation now.")?;
        let watchers = IntGauge::new("mailroom_scaler_watchers", "Inactive consumers with a watcher now.")?;
        let activations =
            IntCounter::new("mailroom_scaler_activations_total", "Consumers that were found to have something to do.")?;
        let watcher_failures = IntCounter::new(
            "mailroom_scaler_watcher_failures_total",
            "New reasons why an inactive consumer could have no watcher, and is asked every second instead.",
        )?;
        let build = IntGaugeVec::new(Opts::new("mailroom_build_info", "The host's version; always 1."), &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        registry.register(Box::new(build))?;
        registry.register(Box::new(requests.clone()))?;
        for gauge in [&streams, &watchers] {
            registry.register(Box::new(gauge.clone()))?;
        }
        for counter in [&activations, &watcher_failures] {
            registry.register(Box::new(counter.clone()))?;
        }
        Ok(Self { registry, requests, streams, watchers, activations, watcher_failures })
    }
}

/// Counts itself in a gauge for as long as it lives.
struct Observed(IntGauge);

impl Observed {
    fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        self.0.dec();
    }
}
