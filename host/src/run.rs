//! `host run`: from the command line to the loop and back. The loop's part of it is any handler's.

use crate::admin::{Admin, Component, Condition, Health, Metrics};
use crate::capabilities::{Configuration, Grants, HttpArgs, KeyValue, NatsBucket, Usage};
use crate::cli::{counted, runtime};
use crate::component::{CacheArgs, Pin};
use crate::dev::DevServer;
use crate::handler::{Handler, PoolUse};
use crate::host::{Conditions, Consumer, Host, Stop, Work, connect_patiently};
use crate::identity::Losses;
use crate::layout::{Layout, unsafe_settings};
use crate::log::LogArgs;
use crate::names::{NameArgs, Names};
use crate::nats::{Nats, NatsArgs, check_jetstream};
use crate::parking::Mover;
use crate::pool::{Guest, Limits, Pools, SLOTS_MAX};
use crate::provision::{Mode, provision};
use crate::replacement::{Current, Replacing, Source, Watching, elsewhere};
use crate::room;
use crate::scheduling::{let_others_go_first, soon_after_waking};
use crate::settle::Policy;
use crate::sink::Sink;
use crate::unreadable::{Alarm, Search};
use anyhow::{Context, Result, bail, ensure};
use async_nats::Client;
use async_nats::jetstream::response::Response;
use bytesize::ByteSize;
use futures::FutureExt as _;
use serde::Deserialize;
use serde_json::json;
use std::future::ready;
use std::io::{IsTerminal as _, stderr};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::select;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{JoinSet, yield_now};

/// How soon after a signal the same one is its echo, for nobody asks twice so quickly: timeout(1) sends it to the host and to
/// the process group that the host is in, and after Ctrl-C the terminal has done so already.
const ECHO_MAX: Duration = Duration::from_millis(100);

/// How often the consumer's backlog is asked for.
const BACKLOG_INTERVAL: Duration = Duration::from_secs(5);

/// Longest wait for the shards after the grace period: they only hand messages back.
const STOP_MAX: Duration = Duration::from_secs(20);

/// How long a start takes at most, mostly: then the code that it alone needed is given back.
const START_MAX: Duration = Duration::from_millis(100);

/// Longest wait for an answer of JetStream's at start.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// What the guest asks of NATS, or of a server, takes at most one part in so many of its deadline: it hears what went wrong.
const GUEST_PART: u32 = 2;

/// What the operator tells the guest.
#[derive(Debug, Clone, clap::Args)]
pub struct ConfigurationArgs {
    /// Configuration that the guest reads through wasi:config, or is told; repeatable
    #[arg(long = "config", value_name = "KEY=VALUE", env = "MAILROOM_CONFIG", value_delimiter = '\n')]
    pairs: Vec<String>,

    /// The same as TOML: tables become keys with dots, and `{ file = "PATH" }` is what stands in that file; --config
    /// comes after it
    #[arg(long = "config-file", value_name = "FILE", env = "MAILROOM_CONFIG_FILE")]
    file: Option<PathBuf>,
}

impl ConfigurationArgs {
    /// Reads the file and checks the pairs.
    ///
    /// # Errors
    /// As [`Configuration::read`] and [`Configuration::parse`].
    pub fn resolve(&self) -> Result<Configuration> {
        let file = self.file.as_deref().map(Configuration::read).transpose()?.unwrap_or_default();
        file.with(&self.pairs)
    }
}

/// What the operator lets guests have.
#[derive(Debug, Clone, clap::Args)]
struct GrantArgs {
    #[command(flatten)]
    configuration: ConfigurationArgs,

    /// What guests share through wasi:keyvalue and mailroom:triage/claims: `nats:BUCKET` on the server, 64 MiB of this
    /// process's `memory`, or `none`
    #[arg(long, value_name = "STORE", env = "MAILROOM_KEYVALUE", default_value = "none")]
    keyvalue: KeyValue,

    #[command(flatten)]
    http: HttpArgs,
}

/// Arguments that bound what a guest may use, shared by the commands that run one.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Guest")]
pub struct GuestArgs {
    #[command(flatten)]
    grants: GrantArgs,

    /// Most time for one message, waiting included
    #[arg(long, value_name = "TIME", env = "MAILROOM_DEADLINE", default_value = "1s", value_parser = humantime::parse_duration)]
    pub deadline: Duration,

    /// Most memory for one message's instance
    #[arg(long, value_name = "SIZE", env = "MAILROOM_MEMORY_MAX", default_value = "64MiB")]
    memory_max: ByteSize,

    /// Most bytes that the guest may return
    #[arg(long, value_name = "SIZE", env = "MAILROOM_OUTPUT_MAX", default_value = "64KiB")]
    output_max: ByteSize,

    /// Most calls that the guest may make to the host for one message
    #[arg(long, value_name = "N", env = "MAILROOM_HOST_CALLS_MAX", default_value_t = 100_000)]
    host_calls_max: u64,
}

impl GuestArgs {
    /// Checks the bounds, for `slots` instances or as many as are usual.
    ///
    /// # Errors
    /// A bound that no guest could live with, or a configuration that is none.
    pub fn resolve(&self, slots: Option<u32>) -> Result<(Grants, Limits)> {
        ensure!(!self.deadline.is_zero(), "--deadline 0s leaves no time to run; 1s is usual");
        let memory = self.memory_max.as_u64();
        ensure!(
            (64 << 10..=4 << 30).contains(&memory),
            "--memory-max {}: between 64 KiB (one page) and 4 GiB",
            self.memory_max
        );
        let output = self.output_max.as_u64();
        ensure!((1 << 10..=64 << 20).contains(&output), "--output-max {}: between 1 KiB and 64 MiB", self.output_max);
        let limits = Limits {
            slots,
            memory_max_bytes: usize::try_from(memory).context("--memory-max")?,
            deadline: self.deadline,
            output_max_bytes: usize::try_from(output).context("--output-max")?,
            host_calls_max: self.host_calls_max,
        };
        let GrantArgs { configuration, keyvalue, http } = &self.grants;
        let grants = Grants {
            configuration: configuration.resolve()?,
            keyvalue: keyvalue.clone(),
            http: http.resolve(self.deadline / GUEST_PART)?,
            usage: Usage::default(),
        };
        Ok((grants, limits))
    }
}

/// Fetch messages and run the component on each: the loop
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  host run --component triage.wasm --dev               try it: brings its own nats-server
  host provision && host run --component triage.wasm   on the server at 127.0.0.1:4222
  host run --component triage.cwasm --server tls://nats.example.com --creds host.creds

SIGTERM and SIGINT drain: nothing more is fetched, what runs is finished within --grace. A second
one exits at once; the same within 100 ms, as timeout(1) sends it, is none.
SIGHUP loads the component anew, for the messages that come then; one that does not fit changes
nothing.
Exit codes: 0 drained, 1 could not start or go on, 2 wrong usage.")]
pub struct RunArgs {
    /// The component: a .wasm, or a .cwasm from `host compile`
    #[arg(short, long, value_name = "FILE", env = "MAILROOM_COMPONENT")]
    component: PathBuf,

    /// Let only the component with this digest run, at the start and ever after; `host inspect` prints digests
    #[arg(long, value_name = "sha256:…", env = "MAILROOM_COMPONENT_DIGEST")]
    component_digest: Option<Pin>,

    /// Load the component anew when its file changes, as at SIGHUP
    #[arg(long, env = "MAILROOM_WATCH", value_parser = clap::builder::BoolishValueParser::new())]
    watch: bool,

    /// Start a private nats-server with JetStream, provision it, and clean up on exit
    #[arg(long, env = "MAILROOM_DEV", value_parser = clap::builder::BoolishValueParser::new(), conflicts_with_all = ["servers", "creds", "user", "password", "password_file", "token", "token_file", "nkey_file"])]
    dev: bool,

    /// nats-server executable for --dev [default: the one on the PATH]
    #[arg(long, value_name = "FILE", env = "MAILROOM_NATS_SERVER", requires = "dev")]
    nats_server: Option<PathBuf>,

    /// Most instances alive at the same time, over all shards [default: 64 per shard, fewer where memory is limited]
    #[arg(long, value_name = "N", env = "MAILROOM_SLOTS")]
    slots: Option<u32>,

    #[command(flatten)]
    guest: GuestArgs,

    #[command(flatten)]
    cache: CacheArgs,

    #[command(flatten)]
    serve: ServeArgs,
}

/// Arguments of the loop, whatever runs on the messages.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = None)]
pub struct ServeArgs {
    /// Where to serve /metrics, /livez and /readyz; `none` for nowhere
    #[arg(long, value_name = "ADDRESS", env = "MAILROOM_LISTEN", default_value = "127.0.0.1:9464")]
    listen: Listen,

    /// Threads that fetch and run messages [default: one per core]
    #[arg(long, value_name = "N", env = "MAILROOM_SHARDS")]
    shards: Option<u32>,

    /// Most messages that one shard holds, fetched and not settled; the rest waits in JetStream
    #[arg(long, value_name = "N", env = "MAILROOM_MAX_IN_FLIGHT", default_value_t = 256)]
    max_in_flight: usize,

    /// Deliveries after which a message that breaks its instance goes to the dead letters
    #[arg(long, value_name = "N", env = "MAILROOM_ATTEMPTS", default_value_t = 5)]
    attempts: u64,

    /// Deliveries after which a message goes to the dead letters without being run
    #[arg(long, value_name = "N", env = "MAILROOM_MAX_DELIVER", default_value_t = 20)]
    max_deliver: u64,

    /// Largest message that is run, payload and headers; a larger one goes to the dead letters
    #[arg(long, value_name = "SIZE", env = "MAILROOM_MESSAGE_MAX", default_value = "8MiB")]
    message_max: ByteSize,

    /// Shortest wait before a message is delivered again; doubles with each attempt
    #[arg(long, value_name = "TIME", env = "MAILROOM_RETRY_MIN", default_value = "1s", value_parser = humantime::parse_duration)]
    retry_min: Duration,

    /// Longest wait before a message is delivered again
    #[arg(long, value_name = "TIME", env = "MAILROOM_RETRY_MAX", default_value = "5m", value_parser = humantime::parse_duration)]
    retry_max: Duration,

    /// From which wait on a message waits in --parked-stream for its next delivery, so that nothing is unsettled at the
    /// consumer and pods can go
    #[arg(long, value_name = "TIME", env = "MAILROOM_PARK_AFTER", default_value = "30s", value_parser = humantime::parse_duration)]
    park_after: Duration,

    /// How long to let running messages finish after SIGTERM or SIGINT
    #[arg(long, value_name = "TIME", env = "MAILROOM_GRACE", default_value = "25s", value_parser = humantime::parse_duration)]
    grace: Duration,

    #[command(flatten)]
    nats: NatsArgs,

    #[command(flatten)]
    names: NameArgs,

    #[command(flatten)]
    log: LogArgs,
}

/// Where the admin endpoint is.
#[derive(Debug, Clone, Copy)]
pub enum Listen {
    /// At this address.
    At(SocketAddr),
    /// There is none.
    Nowhere,
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::Nowhere),
            _ => text
                .parse()
                .map(Self::At)
                .map_err(|_| "an address with a port, 0.0.0.0:9464 for example, or none".into()),
        }
    }
}

/// The loop's configuration as meant: checked whole before anything opens.
struct Config {
    shards: u32,
    deadline: Duration,
    max_in_flight: usize,
    policy: Policy,
    grace: Duration,
    listen: Listen,
    nats: Nats,
    names: Names,
    /// What guests share, if it is on the server.
    bucket: Option<Arc<NatsBucket>>,
}

impl RunArgs {
    /// Carries out `host run`: returns when the host has drained.
    ///
    /// # Errors
    /// Anything wrong with the configuration, the component or the server's streams, with the remedy.
    pub fn execute(self) -> Result<ExitCode> {
        let _log = self.serve.log.start()?;
        let shards = self.serve.shards()?;
        self.check_slots(shards)?;
        let (grants, limits) = self.guest.resolve(self.slots)?;
        let mut config = self.serve.resolve(shards, limits.deadline)?;
        config.bucket = grants.keyvalue.nats();

        // This thread talks to the server while others load the component and run it.
        if let Err(err) = soon_after_waking() {
            tracing::debug!("the start may take longer on a busy machine: {err}");
        }
        // Before anything that takes long: the first process of a container ignores signals without a handler.
        let runtime = runtime()?;
        let _entered = runtime.enter();
        let mut signals = Signals::new()?;
        let hangups = signal(SignalKind::hangup()).context("handle SIGHUP")?;

        let source = Source { path: self.component, cache: self.cache, pin: self.component_digest };
        let watching = self.watch.then(|| Watching::new(&source.path));
        let mut load = load(source, watching, hangups, grants, limits, shards).boxed();
        let mut server = None;
        if self.dev {
            // What is wrong with the component is said before there is a server.
            load = ready(Ok(runtime.block_on(load)?)).boxed();
            let server = server.insert(DevServer::start(self.nats_server.as_deref())?);
            config.nats = Nats::at(server.url())?;
            runtime.block_on(provision_privately(&config.nats, config.names.clone()))?;
            let monitoring = server.monitoring_url();
            tracing::info!(server = server.url(), monitoring, "private nats-server is up and provisioned");
            tracing::info!("try it: host publish --server {} MAIL.eml", server.url());
            tracing::info!("and see: host verdicts --server {} --follow", server.url());
        }
        runtime.block_on(serve(config, load, &mut signals))?;
        Ok(ExitCode::SUCCESS)
    }

    fn check_slots(&self, shards: u32) -> Result<()> {
        let Some(slots) = self.slots else { return Ok(()) };
        ensure!(
            slots >= shards,
            "--slots {slots}: every one of the {shards} shards needs a slot; fewer --shards or more --slots"
        );
        ensure!(
            slots <= SLOTS_MAX,
            "--slots {slots}: at most {SLOTS_MAX}, since each takes 4 GiB of address space; a shard that only computes \
             needs few, and more hosts share a consumer"
        );
        Ok(())
    }
}

impl ServeArgs {
    /// Runs `handler` on the messages, in each shard on one at a time; returns when the host has drained.
    ///
    /// # Errors
    /// Anything wrong with the configuration or the server's streams, with the remedy.
    pub fn execute<H: Handler>(self, handler: H) -> Result<ExitCode> {
        let _log = self.log.start()?;
        let shards = self.shards()?;
        // Nothing ends a handler that takes too long, so there is nothing to compare with the consumer's `ack_wait`.
        let config = self.resolve(shards, Duration::ZERO)?;
        let runtime = runtime()?;
        let _entered = runtime.enter();
        let mut signals = Signals::new()?;
        let loaded = Work::new(Current::new(Arc::new(handler)), shards, shards);
        runtime.block_on(serve(config, ready(loaded), &mut signals))?;
        Ok(ExitCode::SUCCESS)
    }

    fn shards(&self) -> Result<u32> {
        let shards = match self.shards {
            Some(shards) => shards,
            None => std::thread::available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(1)),
        };
        ensure!((1..=256).contains(&shards), "--shards {shards}: between 1 and 256; one per core is best");
        Ok(shards)
    }

    fn resolve(self, shards: u32, deadline: Duration) -> Result<Config> {
        ensure!(
            (1..=65_536).contains(&self.max_in_flight),
            "--max-in-flight {}: between 1 and 65536",
            self.max_in_flight
        );
        ensure!(self.attempts >= 1, "--attempts 0: a message is run at least once");
        ensure!(
            self.max_deliver >= self.attempts,
            "--max-deliver {} is below --attempts {}: messages would be given up before their last attempt",
            self.max_deliver,
            self.attempts
        );
        ensure!(self.message_max.as_u64() > 0, "--message-max 0: no message would be run");
        ensure!(
            self.retry_min <= self.retry_max,
            "--retry-min {:?} is above --retry-max {:?}",
            self.retry_min,
            self.retry_max
        );
        Ok(Config {
            shards,
            deadline,
            max_in_flight: self.max_in_flight,
            policy: Policy {
                attempts: self.attempts,
                max_deliver: self.max_deliver,
                message_max_bytes: usize::try_from(self.message_max.as_u64()).context("--message-max")?,
                retry_min: self.retry_min,
                retry_max: self.retry_max,
                park_after: self.park_after,
            },
            grace: self.grace,
            listen: self.listen,
            nats: self.nats.resolve()?,
            names: self.names.resolve()?,
            bucket: None,
        })
    }
}

impl<H: Handler> Work<H> {
    /// With the metrics of whatever is `current` when they are read; `slots` are those meant, until all shards have begun.
    fn new(current: Current<H>, shards: u32, slots: u32) -> Result<Self> {
        let read = current.clone();
        let metrics = Metrics::new(move || {
            let handlers = read.all();
            let uses = handlers.iter().filter_map(|handler| handler.pool_use());
            Component {
                digest: handlers[0].digest().clone(),
                slots: match handlers.len() == shards as usize {
                    true => handlers.iter().map(|handler| handler.slots()).sum(),
                    false => slots,
                },
                pool_use: uses.reduce(PoolUse::and),
            }
        })?;
        Ok(Self { current, metrics, slots })
    }
}

/// Loads the component for the first shard, and for all from then on whenever it is to be replaced. The others link it when
/// they begin: a start with much to do for few messages would be no start.
async fn load(
    source: Source,
    watching: Option<Watching>,
    hangups: Signal,
    grants: Grants,
    limits: Limits,
    shards: u32,
) -> Result<Work<Guest>> {
    let granted = grants.clone();
    let (guest, slots, source) = elsewhere(move || {
        if let Err(err) = soon_after_waking() {
            tracing::debug!("the component is loaded in long turns: {err}");
        }
        let pools = Pools::new(&limits, shards)?;
        let pool = pools.of_shard(0)?;
        let_others_go_first();
        let loaded = Arc::new(source.load(pool.engine())?);
        Ok((Guest::new(pool, loaded, &grants)?, pools.slots(), source))
    })
    .await?;
    guest.try_out().await?;
    let work = Work::new(Current::new(Arc::new(guest)), shards, slots)?;
    work.metrics.add(granted.metrics())?;
    let (current, metrics) = (work.current.clone(), work.metrics.clone());
    tokio::spawn(Replacing::new(source, current, shards as usize, metrics, hangups, watching).run());
    Ok(work)
}

/// Serves what `load` gives. Meanwhile the server is connected to, its streams are checked, and the shards are started.
async fn serve<H: Handler>(
    config: Config,
    load: impl Future<Output = Result<Work<H>>>,
    signals: &mut Signals,
) -> Result<()> {
    let config = Arc::new(config);
    let stop = Stop::default();
    let health = Health::default();
    let connected = health.condition("no connection to NATS");
    let checked = health.condition("streams and consumer not checked yet");
    let alarm = Alarm::default();
    let (loaded, work) = watch::channel(None);
    let start = Start { work, health: health.clone(), alarm: alarm.clone(), stop: stop.clone() };
    let opening = tokio::spawn(open(config.clone(), connected, start));
    // The connection is begun first, so that the server works while the loading thread is made.
    yield_now().await;
    let work = select! {
        work = load => work?,
        name = signals.next() => {
            tracing::info!("{name}: stopping before the component was loaded");
            return Ok(());
        }
    };
    loaded.send_replace(Some(work.clone()));
    let Work { current, metrics, slots } = work;
    let mut tasks = JoinSet::new();
    if let Listen::At(address) = config.listen {
        let admin = Admin::bind(address).await?;
        tracing::info!(url = format!("http://{}", admin.address), "admin endpoint");
        let metrics = metrics.clone();
        tasks.spawn(admin.serve(move || metrics.text(), health.clone()));
    }
    let opened = select! {
        opened = opening => opened.context("connecting broke off")??,
        name = signals.next() => {
            tracing::info!("{name}: stopping before the start");
            return Ok(());
        }
    };
    let Some(Opened { client, jetstream, mut shards }) = opened else { return Ok(()) };
    let not_draining = health.condition("draining");
    not_draining.set(true);
    let not_paused = health.condition("the consumer is paused");
    not_paused.set(true);
    checked.set(true);
    tasks.spawn(Mover::new(jetstream.clone(), config.names.parked_stream.clone()).run());
    tasks.spawn(watch_backlog(jetstream.clone(), config.names.clone(), metrics.clone(), not_paused));
    let sink = Sink::new(jetstream.clone(), config.names.clone());
    let component = {
        let current = current.clone();
        Box::new(move || current.any().digest().clone())
    };
    let search = Search {
        client,
        jetstream,
        names: config.names.clone(),
        sink,
        component,
        metrics: metrics.clone(),
        alarm,
        retry_max: config.policy.retry_max,
    };
    tasks.spawn(search.run());

    let running = current.any();
    tracing::info!(
        component = running.name(),
        digest = %running.digest(),
        server = config.nats.servers(),
        stream = config.names.stream,
        consumer = config.names.consumer,
        shards = config.shards,
        slots,
        "running"
    );
    drop(running);
    tasks.spawn(async {
        tokio::time::sleep(START_MAX).await;
        if let Err(err) = room::give_back_code() {
            tracing::debug!("what the start needed stays in memory: {err}");
        }
    });
    let mut ends = Vec::new();
    select! {
        name = signals.next() => tracing::info!("{name}: draining, for at most {:?}", config.grace),
        Some(end) = shards.join_next() => ends.push(end),
    }
    not_draining.set(false);
    stop.drain.cancel();
    let finish = async {
        while let Some(end) = shards.join_next().await {
            ends.push(end);
        }
    };
    let grace = async {
        tokio::time::sleep(config.grace).await;
        stop.now.cancel();
        tokio::time::sleep(STOP_MAX).await;
    };
    select! {
        () = finish => {}
        () = grace => bail!("a shard did not stop within {STOP_MAX:?} of the grace period's end"),
        name = signals.next() => {
            tracing::warn!("{name} again: stopping at once; what runs is delivered again");
            std::process::exit(signals.exit_code());
        }
    }
    let mut not_done = 0;
    for end in ends {
        not_done += end.context("a shard ended by itself")??;
    }
    match not_done {
        0 => tracing::info!("drained"),
        _ => {
            let messages = counted(not_done as u64, "message");
            tracing::warn!("stopped: {messages} not done in time and to be delivered again");
        }
    }
    Ok(())
}

/// What shards are started with, beside the configuration.
struct Start<H> {
    work: watch::Receiver<Option<Work<H>>>,
    health: Health,
    alarm: Alarm,
    stop: Stop,
}

/// A connection, JetStream behind it, and the shards.
struct Opened {
    client: Client,
    jetstream: async_nats::jetstream::Context,
    shards: JoinSet<Result<usize>>,
}

/// Connects, as often as it takes, checks what is there, and starts the shards. Nothing, if the host stops first.
///
/// # Errors
/// As [`connect_patiently`] and [`check`].
async fn open<H: Handler>(config: Arc<Config>, connected: Condition, start: Start<H>) -> Result<Option<Opened>> {
    let (losses, stop) = (Arc::<Losses>::default(), &start.stop.drain);
    let Some(client) = connect_patiently(&config.nats, "mailroom", losses, connected, stop).await? else {
        return Ok(None);
    };
    let jetstream = config.nats.jetstream(client.clone(), REQUEST_TIMEOUT);
    check(&jetstream, &config).await?;
    let shards = start_shards(&config, &start)?;
    Ok(Some(Opened { client, jetstream, shards }))
}

/// Makes streams, consumer and bucket with their defaults.
async fn provision_privately(nats: &Nats, names: Names) -> Result<()> {
    let client = nats.connect("mailroom provision", |_| ()).await?;
    let jetstream = nats.jetstream(client, REQUEST_TIMEOUT);
    provision(&jetstream, &Layout::new(names), Mode::Create).await?;
    Ok(())
}

/// Refuses to start on settings under which messages could be lost or doubled.
async fn check(jetstream: &async_nats::jetstream::Context, config: &Config) -> Result<()> {
    let names = &config.names;
    let consumer = match Consumer::look_up(jetstream, names).await {
        Ok(consumer) => consumer,
        Err(err) => {
            // The reason may lie deeper: no JetStream at all, or no permission to use it.
            check_jetstream(jetstream).await?;
            return Err(err);
        }
    };
    let wrong = unsafe_settings(&consumer.stream, &consumer.info.config, &consumer.verdict_stream, config.deadline);
    if !wrong.is_empty() {
        bail!("unsafe settings: {}", wrong.join("; "));
    }
    if let Some(bucket) = &config.bucket {
        bucket.open(jetstream, config.deadline / GUEST_PART).await?;
    }
    Ok(())
}

/// Starts the shards, each on a thread of its own; the tasks end as the threads do, with what [`Host::run_shard`] says.
fn start_shards(config: &Config, start: &Start<impl Handler>) -> Result<JoinSet<Result<usize>>> {
    let mut shards = JoinSet::new();
    for number in 0..config.shards {
        let Start { work, health, alarm, stop } = start;
        let host = Host {
            work: work.clone(),
            nats: config.nats.clone(),
            names: config.names.clone(),
            policy: config.policy.clone(),
            max_in_flight: config.max_in_flight,
            conditions: Conditions::new(number, health),
            alarm: alarm.clone(),
            stop: stop.clone(),
        };
        let (sender, receiver) = tokio::sync::oneshot::channel();
        std::thread::Builder::new()
            .name(format!("shard-{number}"))
            .spawn(move || sender.send(host.run_shard(number)))
            .with_context(|| format!("start the thread of shard {number}"))?;
        shards.spawn(async move { receiver.await.context("a shard's thread broke off")? });
    }
    Ok(shards)
}

/// What a look at the consumer's backlog asks of its information.
#[derive(Deserialize)]
struct Backlog {
    num_pending: i64,
    num_ack_pending: i64,
    /// Known to servers from 2.11 on.
    #[serde(default)]
    paused: bool,
}

/// Keeps the gauges up to date that only the server knows, the consumer's backlog and its dead letters, and says when
/// somebody has paused the consumer.
async fn watch_backlog(
    jetstream: async_nats::jetstream::Context,
    names: Names,
    metrics: Metrics,
    not_paused: Condition,
) {
    let subject = format!("CONSUMER.INFO.{}.{}", names.stream, names.consumer);
    loop {
        if let Ok(Response::Ok(backlog)) = jetstream.request(subject.clone(), &json!({})).await {
            let Backlog { num_pending, num_ack_pending, paused } = backlog;
            metrics.consumer_pending.set(num_pending);
            metrics.consumer_ack_pending.set(num_ack_pending);
            match (not_paused.set(!paused), paused) {
                (true, true) => tracing::warn!("consumer {} is paused: no messages until it goes on", names.consumer),
                (true, false) => tracing::info!("consumer {} is no longer paused", names.consumer),
                (false, _) => {}
            }
        }
        if let Ok(stream) = jetstream.get_stream(&names.dead_stream).await {
            metrics.dead_letters.set(i64::try_from(stream.cached_info().state.messages).unwrap_or(i64::MAX));
        }
        tokio::time::sleep(BACKLOG_INTERVAL).await;
    }
}

/// The signals that ask a process to stop.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    on_terminal: bool,
    /// The number of the last one, and when it came.
    last: Option<(i32, Instant)>,
}

impl Signals {
    /// Takes them from now on.
    ///
    /// # Errors
    /// The system does not let us.
    pub fn new() -> Result<Self> {
        let terminate = signal(SignalKind::terminate()).context("handle SIGTERM")?;
        let interrupt = signal(SignalKind::interrupt()).context("handle SIGINT")?;
        let hangup = signal(SignalKind::hangup()).context("handle SIGHUP")?;
        Ok(Self { terminate, interrupt, hangup, on_terminal: stderr().is_terminal(), last: None })
    }

    /// Waits for the next one that is no echo, and names it.
    ///
    /// Cancel safe: none is lost.
    pub async fn next(&mut self) -> &'static str {
        loop {
            let (kind, name) = select! {
                _ = self.terminate.recv() => (SignalKind::terminate(), "SIGTERM"),
                _ = self.interrupt.recv() => (SignalKind::interrupt(), "SIGINT"),
                () = terminal_closed(&mut self.hangup, self.on_terminal) => {
                    (SignalKind::hangup(), "the terminal was closed")
                }
            };
            let (number, now) = (kind.as_raw_value(), Instant::now());
            if !is_echo(number, now, self.last) {
                self.last = Some((number, now));
                return name;
            }
        }
    }

    /// The exit code of a process that the last one ended: 128 and its number.
    pub fn exit_code(&self) -> i32 {
        128 + self.last.map_or(0, |(number, _)| number)
    }
}

/// Whether a signal is an echo of the last one.
fn is_echo(number: i32, now: Instant, last: Option<(i32, Instant)>) -> bool {
    last.is_some_and(|(before, then)| number == before && now.duration_since(then) < ECHO_MAX)
}

/// Waits until the terminal that the host was started on is gone: SIGHUP says that too.
async fn terminal_closed(hangup: &mut Signal, on_terminal: bool) {
    loop {
        hangup.recv().await;
        if on_terminal && !stderr().is_terminal() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_is_the_same_signal_soon() {
        let then = Instant::now();
        for (last, after, expected) in
            [(None, 0, false), (Some(15), 0, true), (Some(15), 99, true), (Some(15), 100, false), (Some(2), 0, false)]
        {
            let now = then + Duration::from_millis(after);
            assert_eq!(is_echo(15, now, last.map(|number| (number, then))), expected, "{last:?}, {after} ms");
        }
    }
}
