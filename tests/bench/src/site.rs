//! What the cases stand on: a server, mail in its stream, and programs that settle it.

use anyhow::{Context as _, Result, bail, ensure};
use async_nats::jetstream::consumer::PullConsumer;
use bytes::Bytes;
use futures::future::try_join_all;
use serde::Serialize;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime};
use tempfile::TempDir;
use tests::bed::{Bed, SOON};
use tests::prelude::Signal;
use tests::report::{Memory, median};
use tests::{Host, HostBuilder, Process, command, streams, tools};
use tokio::time::{Instant, sleep};

/// How much of everything is measured.
#[derive(Clone, Debug)]
pub struct Amount {
    /// Rounds of what takes seconds; what takes milliseconds gets ten times as many.
    pub rounds: usize,
    /// Messages that are drained in a run.
    pub messages: u64,
    /// How long messages are published at each rate.
    pub load: Duration,
    /// Also what takes minutes.
    pub full: bool,
}

/// A server with streams, and the components as the programs take them.
pub struct Site {
    pub bed: Bed,
    pub amount: Amount,
    folder: TempDir,
    /// Numbers the consumers: ids of messages have their name in them, and must not come again.
    consumers: u32,
}

/// A program, and how it is started.
#[derive(Debug)]
pub struct Variant {
    pub key: &'static str,
    pub name: &'static str,
    pub program: Program,
    pub args: &'static [&'static str],
    /// Whether errors take a backtrace.
    pub backtrace: bool,
}

/// What settles messages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Program {
    /// `host run` on machine code of this component: as it is shipped, static, without a compiler.
    Host(&'static str),
    /// The same as it is built for every day: with shared libraries and a compiler, optimized crate by crate.
    EverydayHost(&'static str),
    /// The host's loop with a native function, built as the host is.
    Native,
    /// The same as it is built for every day.
    EverydayNative,
    /// An executable that counts what it does: `host run` on machine code of this component, or a native handler.
    Counted { executable: &'static str, component: Option<&'static str> },
    /// The program `usual-host`.
    Usual,
}

/// The component as the host likes it best, and as compilers make it.
pub const LEAN: &str = "triage";
pub const ORDINARY: &str = "triage-ordinary";
/// The one that remembers mails.
pub const REMEMBERING: &str = "triage-memory";

/// A program as it is usually started.
pub const fn variant(key: &'static str, name: &'static str, program: Program) -> Variant {
    Variant { key, name, program, args: &[], backtrace: false }
}

/// What all others are compared with.
pub const NATIVE: Variant = variant("native", "native-handler", Program::Native);
pub const HOST: Variant = variant("host", "host run", Program::Host(LEAN));
pub const USUAL: Variant = variant("usual", "usual design", Program::Usual);

/// One run of a program, or several together, through all messages that waited.
#[derive(Clone, Debug, Serialize)]
pub struct Drained {
    pub messages: u64,
    /// From readiness to the last verdict, by the server's clock, which is this machine's.
    pub seconds: f64,
    /// User and system time of the programs.
    pub cpu_seconds: f64,
    /// The largest resident set of one of the programs.
    pub peak_rss_kib: u64,
    /// The largest share of memory that was seen, of all programs together.
    pub pss_kib: u64,
}

/// Medians of runs.
#[derive(Clone, Debug, Serialize)]
pub struct Medians {
    pub messages_per_second: f64,
    pub cpu_us_per_message: f64,
    pub peak_rss_mib: f64,
    pub pss_mib: f64,
}

impl Medians {
    pub fn of(runs: &[Drained]) -> Self {
        let of = |of: &dyn Fn(&Drained) -> f64| median(runs.iter().map(of));
        Self {
            messages_per_second: of(&|run| run.messages as f64 / run.seconds),
            cpu_us_per_message: of(&|run| 1e6 * run.cpu_seconds / run.messages as f64),
            peak_rss_mib: of(&|run| run.peak_rss_kib as f64 / 1024.0),
            pss_mib: of(&|run| run.pss_kib as f64 / 1024.0),
        }
    }
}

/// How often a consumer is asked what is left.
const POLL: Duration = Duration::from_millis(25);

/// Looking at a program's memory stops it for a moment, so that happens less often.
const POLLS_PER_LOOK: u32 = 10;

/// Least rate at which messages are settled: one that is slower is taken for stuck.
const RATE_MIN: u64 = 1000;

/// Publications whose PubAck is still to come while a stream is filled.
const UNACKNOWLEDGED_MAX: usize = 1000;

/// The kernel counts processor time in hundredths of a second.
const TICKS_PER_SECOND: f64 = 100.0;

impl Site {
    /// Starts the server and compiles the components.
    pub async fn new(amount: Amount) -> Result<Self> {
        Self::on(Bed::new().await?, amount).await
    }

    /// The same on a server that runs.
    pub async fn on(mut bed: Bed, amount: Amount) -> Result<Self> {
        bed.server.process().quiet();
        let folder = tempfile::Builder::new().prefix("mailroom-bench-").tempdir().context("make a temporary folder")?;
        let site = Self { bed, amount, folder, consumers: 0 };
        for component in [LEAN, ORDINARY, REMEMBERING, "actor"] {
            let (wasm, cwasm) = (tools::component(component)?, site.cwasm(component));
            let args = ["compile".as_ref(), wasm.as_os_str(), "--output".as_ref(), cwasm.as_os_str()];
            command::host(args).await?.success()?;
        }
        Ok(site)
    }

    /// Where the machine code of a component is.
    pub fn cwasm(&self, component: &str) -> PathBuf {
        self.folder.path().join(format!("{component}.cwasm"))
    }

    /// Empties a stream.
    pub async fn empty(&self, stream: &str) -> Result<()> {
        self.bed.jetstream.get_stream(stream).await?.purge().await?;
        Ok(())
    }

    /// Sees to it that `count` messages, all of them `mail`, are in the stream, and no others.
    pub async fn fill(&self, mail: &[u8], count: u64) -> Result<()> {
        let mail = Bytes::copy_from_slice(mail);
        self.fill_with(count, |_| mail.clone()).await
    }

    /// Sees to it that `count` messages are in the stream, the mails with numbers from 0 on, and no others.
    pub async fn fill_with(&self, count: u64, mail: impl Fn(u64) -> Bytes) -> Result<()> {
        self.empty(streams::MAIL).await?;
        let mut number = 0;
        while number < count {
            let mut stored = Vec::new();
            while number < count && stored.len() < UNACKNOWLEDGED_MAX {
                stored.push(self.bed.jetstream.publish("mail.bench", mail(number)).await?);
                number += 1;
            }
            for stored in stored {
                stored.await.context("fill the stream")?;
            }
        }
        Ok(())
    }

    /// Makes a consumer that has seen nothing of the stream.
    pub async fn consumer(&mut self) -> Result<String> {
        self.consumers += 1;
        let name = format!("bench-{}", self.consumers);
        self.bed.provision(&["--consumer", &name]).await?;
        Ok(name)
    }

    /// Deletes it.
    pub async fn forget(&self, consumer: &str) -> Result<()> {
        self.bed.jetstream.get_stream(streams::MAIL).await?.delete_consumer(consumer).await?;
        Ok(())
    }

    /// A host or a native handler, not yet started.
    pub fn builder(&self, variant: &Variant, consumer: &str) -> Result<HostBuilder> {
        let url = self.bed.server.url();
        let builder = match variant.program {
            Program::Host(component) => {
                Host::on(url).executable(shipped("mailroom-host")?).component(self.cwasm(component))
            }
            Program::EverydayHost(component) => Host::on(url).component(self.cwasm(component)),
            Program::Native => Host::native(url).executable(shipped("native-handler")?),
            Program::EverydayNative => Host::native(url),
            Program::Counted { executable, component: Some(component) } => {
                Host::on(url).executable(executable).component(self.cwasm(component))
            }
            Program::Counted { executable, component: None } => Host::native(url).executable(executable),
            Program::Usual => bail!("{}: no host", variant.name),
        };
        let builder = builder.args(["--consumer", consumer]).args(variant.args);
        let backtrace = if variant.backtrace { "1" } else { "0" };
        // Whatever the caller has.
        Ok(builder.env("RUST_BACKTRACE", backtrace).env("RUST_LIB_BACKTRACE", backtrace))
    }

    /// Starts a program and waits until it says that it works.
    pub async fn start(&self, variant: &Variant, consumer: &str) -> Result<Running> {
        let started = async {
            if variant.program != Program::Usual {
                return Ok(Running::Host(self.builder(variant, consumer)?.start().await?));
            }
            let mut command = Command::new(usual()?);
            command.args(["--server", self.bed.server.url(), "--consumer", consumer]).args(variant.args);
            if !variant.args.contains(&"--native") {
                command.arg("--component").arg(tools::component(ORDINARY)?);
            }
            command.env("RUST_BACKTRACE", "0").env("RUST_LIB_BACKTRACE", "0");
            let process = Process::spawn("usual-host", command)?;
            process.wait_for_line(SOON, |line| line == "ready").await?;
            anyhow::Ok(Running::Usual(process))
        };
        started.await.with_context(|| format!("start: {}", variant.name))
    }

    /// Has `programs` of a kind together settle all messages of the stream, and checks that each has its verdict.
    pub async fn drain(&mut self, variant: &Variant, programs: usize) -> Result<Drained> {
        let consumer = self.consumer().await?;
        self.empty(streams::VERDICTS).await?;
        let messages = streams::count(&self.bed.jetstream, streams::MAIL).await?;
        let mut running = try_join_all((0..programs).map(|_| self.start(variant, &consumer))).await?;
        let began = SystemTime::now();
        let cpu_seconds =
            |running: &mut Vec<Running>| running.iter_mut().map(Running::cpu_seconds).sum::<Result<f64>>();
        let at_start = cpu_seconds(&mut running)?;
        let mut pss_kib = 0;
        let limit = SOON + Duration::from_secs(messages / RATE_MIN);
        let end = Instant::now() + limit;
        let stream = self.bed.jetstream.get_stream(streams::MAIL).await?;
        let mut info: PullConsumer = match stream.get_consumer(&consumer).await {
            Ok(consumer) => consumer,
            Err(err) => bail!("consumer {consumer}: {err}"),
        };
        for poll in 0_u32.. {
            if poll % POLLS_PER_LOOK == 0 {
                let pss = running.iter_mut().map(|one| Ok(Memory::of(one.pid())?.pss_kib));
                pss_kib = pss_kib.max(pss.sum::<Result<u64>>()?);
            }
            let info = info.info().await?;
            if info.num_pending == 0 && info.num_ack_pending == 0 {
                break;
            }
            let left = info.num_pending + info.num_ack_pending as u64;
            ensure!(Instant::now() < end, "{}: {left} of {messages} messages left after {limit:?}", variant.name);
            sleep(POLL).await;
        }
        let cpu_seconds = cpu_seconds(&mut running)? - at_start;
        let peaks = running.iter_mut().map(|one| Memory::peak_of(one.pid())).collect::<Result<Vec<_>>>()?;
        let verdicts = self.bed.jetstream.get_stream(streams::VERDICTS).await?.cached_info().state.clone();
        ensure!(
            verdicts.messages == messages,
            "{}: {} verdicts on {messages} messages",
            variant.name,
            verdicts.messages
        );
        let seconds =
            SystemTime::from(verdicts.last_timestamp).duration_since(began).context("all was done at once")?;
        for one in running {
            one.stop().await?;
        }
        self.forget(&consumer).await?;
        let peak_rss_kib = peaks.into_iter().max().unwrap_or_default();
        Ok(Drained { messages, seconds: seconds.as_secs_f64(), cpu_seconds, peak_rss_kib, pss_kib })
    }
}

/// A program that works.
pub enum Running {
    Host(Host),
    Usual(Process),
}

impl Running {
    fn process(&mut self) -> &mut Process {
        match self {
            Self::Host(host) => host.process(),
            Self::Usual(process) => process,
        }
    }

    pub fn pid(&mut self) -> u32 {
        self.process().id()
    }

    /// User and system time of all its threads.
    fn cpu_seconds(&mut self) -> Result<f64> {
        let file = format!("/proc/{}/stat", self.pid());
        let text = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
        // The name, in parentheses, may hold anything; user and system time are the 14th and 15th field.
        let (_, fields) = text.rsplit_once(") ").with_context(|| format!("no name in {file}"))?;
        let ticks = fields.split(' ').skip(11).take(2).map(|field| Ok(field.parse::<u64>()?)).sum::<Result<u64>>()?;
        Ok(ticks as f64 / TICKS_PER_SECOND)
    }

    /// Asks it to end, as Kubernetes does.
    pub async fn stop(mut self) -> Result<()> {
        let process = self.process();
        process.signal(Signal::TERM)?;
        let status = process.wait(SOON).await?;
        ensure!(status.success(), "a program ended with {status}");
        process.quiet();
        Ok(())
    }
}

/// An executable as it is shipped.
fn shipped(name: &str) -> Result<PathBuf> {
    let folder =
        std::env::var_os("MAILROOM_BENCH_SHIPPED").context("MAILROOM_BENCH_SHIPPED: run `cargo xtask bench`")?;
    Ok(PathBuf::from(folder).join(name))
}

/// The usual design, built beside this program.
fn usual() -> Result<PathBuf> {
    let program = std::env::current_exe().context("find this program")?.with_file_name("usual-host");
    ensure!(program.is_file(), "{} is missing; run `cargo xtask bench`", program.display());
    Ok(program)
}

/// A sample mail whose text is repeated until the mail has this size.
pub fn mail(bytes: usize) -> Result<Vec<u8>> {
    let sample = tools::mails()?.into_iter().next().context("a mail")?;
    let mail = fs::read_to_string(&sample).with_context(|| format!("read {}", sample.display()))?;
    let (head, body) = mail.split_once("\r\n\r\n").with_context(|| format!("{}: no text", sample.display()))?;
    let text = format!("{head}\r\n\r\n{}", body.repeat(1 + bytes / body.len()));
    Ok(text.as_bytes()[..bytes].to_vec())
}
