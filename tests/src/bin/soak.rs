//! The soak: hosts on one consumer, mails of all kinds, and every fault that there is, at random, for as long as wanted.
//!
//! `cargo xtask soak` builds what it needs and runs it. The exit code is 0 only if every mail ended as exactly one
//! verdict or dead letter.

use anyhow::{Context as _, Result, bail, ensure};
use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tests::mix::{self, Publisher};
use tests::{Books, Fault, Fleet, program, streams, tools};
use tokio::time::{Instant, interval, sleep_until};

const HELP: &str = "\
Lets everything fail that can fail, at random, for as long as you like, and counts what is lost or doubled.

Usage: cargo xtask soak [--minutes N] [--seed S] [--hosts N] [--rate N] [--nats-server PATH]

  --minutes N         How long; a round of half a minute is always finished [default: 10]
  --seed S            What decides the mails, the faults and their moments: repeats a run, as far as the machine does
                      [default: another one each time, which is printed]
  --hosts N           So many hosts share the work [default: 3]
  --rate N            Mails a second [default: 300]
  --nats-server PATH  Use this nats-server

It starts a private nats-server and hosts, each behind a network of its own, publishes mails that are triaged, fail,
recover or are rejected, and meanwhile
  kills hosts and the server (SIGKILL) and starts them again,
  freezes hosts and the server (SIGSTOP) and lets them go on,
  cuts networks without a word, resets connections, slows networks down,
  deletes the consumer and makes it again, and lets the stream of verdicts refuse them,
several of these at a time. After each round all is mended; every mail must have ended as one verdict or one dead letter,
and nothing may be pending. Then the streams are emptied and the next round begins.

In a terminal the line at the bottom shows how far it is; elsewhere there is a line every 10 s and one for each round.
Exit code: 0 nothing lost and nothing doubled; 1 otherwise, and then the log of all processes is kept and named.
";

/// How long faults begin in a round.
const ROUND: Duration = Duration::from_secs(30);
/// Between the beginnings of two faults, at least and at most.
const PAUSE_MS: std::ops::RangeInclusive<u64> = 300..=3000;
/// How long a fault lasts, at least and at most: half of them shortly, half of them perhaps for longer than the
/// consumer's `ack_wait`, and than it takes to notice a silent network.
const SHORT_MS: std::ops::RangeInclusive<u64> = 100..=2500;
const LONG_MS: std::ops::RangeInclusive<u64> = 2500..=25_000;
/// All is settled by then after a round.
const SETTLED: Duration = Duration::from_secs(120);
/// How often the line is printed in a terminal, where it replaces the one before, and elsewhere.
const REFRESH: Duration = Duration::from_secs(1);
const LINE: Duration = Duration::from_secs(10);

const PROVISION: [&str; 4] = ["--ack-wait", "5s", "--deadline", "2s"];
const RUN: [&str; 14] = [
    "--log",
    "info,guest=off",
    "--deadline",
    "2s",
    "--max-in-flight",
    "128",
    "--max-deliver",
    "1000",
    "--retry-min",
    "50ms",
    "--retry-max",
    "1s",
    "--park-after",
    "50ms",
];

struct Wanted {
    duration: Duration,
    seed: u64,
    hosts: usize,
    rate: u32,
}

#[tokio::main]
async fn main() -> ExitCode {
    program(HELP, wanted(std::env::args().skip(1)), async |wanted| soak(&wanted).await).await
}

/// What the arguments say; nothing if help is wanted.
fn wanted(mut args: impl Iterator<Item = String>) -> Result<Option<Wanted>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut wanted =
        Wanted { duration: Duration::from_secs(600), seed: now.as_secs() % 1_000_000, hosts: 3, rate: 300 };
    while let Some(flag) = args.next() {
        if ["--help", "-h"].contains(&flag.as_str()) {
            return Ok(None);
        }
        let mut number = |least: u64, most: u64| {
            let number = args.next().and_then(|number| number.parse().ok());
            number
                .filter(|number| (least..=most).contains(number))
                .with_context(|| format!("{flag}: add {least} to {most}"))
        };
        match flag.as_str() {
            "--minutes" => wanted.duration = Duration::from_secs(60 * number(1, 100_000)?),
            "--seed" => wanted.seed = number(0, u64::MAX)?,
            "--hosts" => wanted.hosts = number(1, 16)? as usize,
            "--rate" => wanted.rate = number(20, 5000)? as u32,
            _ => bail!("{flag}: no such option"),
        }
    }
    Ok(Some(wanted))
}

/// Kinds of faults, how they are counted, and how often they come compared with the others.
const KINDS: [(&str, u32); 9] = [
    ("host kills", 6),
    ("host freezes", 4),
    ("cuts", 4),
    ("resets", 4),
    ("slow networks", 2),
    ("server restarts", 2),
    ("server freezes", 2),
    ("consumer deletions", 1),
    ("verdicts refused", 1),
];

/// The fault of a kind in [`KINDS`], and the host or, as nothing, the server that it happens to.
fn fault(kind: usize, host: usize) -> (Fault, Option<usize>) {
    match kind {
        0 => (Fault::HostKilled(host), Some(host)),
        1 => (Fault::HostFrozen(host), Some(host)),
        2 => (Fault::Cut(host), Some(host)),
        3 => (Fault::Reset(host), Some(host)),
        4 => (Fault::Slow(host), Some(host)),
        5 => (Fault::ServerKilled, None),
        6 => (Fault::ServerFrozen, None),
        7 => (Fault::ConsumerDeleted, None),
        _ => (Fault::VerdictsRefused, None),
    }
}

/// What has happened so far.
#[derive(Default)]
struct Tally {
    rounds: u64,
    mails: u64,
    verdicts: usize,
    dead_letters: usize,
    lost: usize,
    doubled: usize,
    /// How often each of [`KINDS`] began.
    faults: [u64; KINDS.len()],
}

/// A fault that lasts.
struct UnderWay {
    until: Instant,
    fault: Fault,
    target: Option<usize>,
}

struct Soak {
    fleet: Fleet,
    publisher: Publisher,
    random: fastrand::Rng,
    tally: Tally,
    begun: Instant,
}

/// Runs rounds for as long as wanted, and says in the end what came of them.
async fn soak(wanted: &Wanted) -> Result<()> {
    let Wanted { duration, seed, hosts, rate } = *wanted;
    println!("soak of {} min with {hosts} hosts and {rate} mails a second, seed {seed}", duration.as_secs() / 60);
    let mut fleet = Fleet::start(&PROVISION, hosts, &RUN).await?;
    fleet.quiet();
    let publisher = Publisher::connect(fleet.bed.server.url(), "soak").await?;
    let random = fastrand::Rng::with_seed(seed);
    let mut soak = Soak { fleet, publisher, random, tally: Tally::default(), begun: Instant::now() };
    let mut mails = mix::mails(seed);
    let mut ended = Ok(());
    while soak.begun.elapsed() < duration && ended.is_ok() {
        let count = rate as usize * ROUND.as_secs() as usize;
        ended = soak.round(mails.by_ref().take(count).collect(), rate).await;
    }
    soak.summary();
    if let Err(err) = ended {
        let (file, minutes) = (soak.keep_log(seed)?, duration.as_secs() / 60);
        bail!(
            "{err:#}\nThe log of all processes is in {}. To repeat it:\n\
             cargo xtask soak --minutes {minutes} --seed {seed} --hosts {hosts} --rate {rate}",
            file.display()
        );
    }
    Ok(())
}

impl Soak {
    /// One round: mails and faults, then nothing but mending, then the books.
    async fn round(&mut self, mails: Vec<&'static str>, rate: u32) -> Result<()> {
        let count = mails.len() as u64;
        let publishing = self.publisher.publish(mails, Some(rate));
        let trouble = trouble(&mut self.fleet, &mut self.random, &mut self.tally, self.begun);
        let (published, troubled) = tokio::join!(publishing, trouble);
        troubled?;
        published?;
        let bed = &self.fleet.bed;
        // What is parked is not at the consumer. Where this waits in vain the books say what is lost.
        let _ = bed.outcomes(count).await;
        bed.settled_within(SETTLED).await?;
        self.fleet.until_ready().await?;
        self.fleet.until_idle().await?;
        let books = Books::of(&bed.jetstream).await?;
        let tally = &mut self.tally;
        tally.rounds += 1;
        tally.mails += books.mails;
        tally.verdicts += books.verdicts;
        tally.dead_letters += books.dead();
        tally.lost += books.lost.len();
        tally.doubled += books.doubled.len() + books.unknown.len();
        println!("{}{}, lost {}, duplicates {}", fresh_line(), line(tally, self.begun), tally.lost, tally.doubled);
        books.balance()?;
        ensure!(books.mails == count, "{} mails are in the stream, and {count} were confirmed", books.mails);
        for stream in [streams::PARKED, streams::MAIL, streams::VERDICTS, streams::DEAD] {
            bed.jetstream.get_stream(stream).await?.purge().await?;
        }
        Ok(())
    }

    /// What happened, all in all.
    fn summary(&self) {
        let Tally { rounds, mails, verdicts, dead_letters, lost, doubled, faults } = &self.tally;
        let rows = [
            ("rounds", *rounds),
            ("messages", *mails),
            ("verdicts", *verdicts as u64),
            ("dead letters", *dead_letters as u64),
        ];
        let faults = KINDS.iter().zip(faults).map(|((name, _), count)| (*name, *count));
        println!();
        for (name, count) in
            rows.into_iter().chain(faults).chain([("lost", *lost as u64), ("duplicates", *doubled as u64)])
        {
            println!("{name:<20}{count:>10}");
        }
    }

    /// Writes what all processes have logged to a file and says to which.
    fn keep_log(&mut self, seed: u64) -> Result<PathBuf> {
        let folder = tools::target().join("soak");
        std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let file = folder.join(format!("{seed}.log"));
        std::fs::write(&file, self.fleet.log().join("\n")).with_context(|| format!("write {}", file.display()))?;
        Ok(file)
    }
}

/// Lets faults begin and end at random, several at a time but one for each host and one for the server, for the time of
/// a round. All of them have ended afterwards.
async fn trouble(fleet: &mut Fleet, random: &mut fastrand::Rng, tally: &mut Tally, begun: Instant) -> Result<()> {
    let end = Instant::now() + ROUND;
    let mut under_way: Vec<UnderWay> = Vec::new();
    let mut next = Instant::now();
    let is_terminal = std::io::stdout().is_terminal();
    let mut refresh = interval(if is_terminal { REFRESH } else { LINE });
    refresh.tick().await;
    loop {
        let ends = under_way.iter().map(|fault| fault.until).min();
        let begins = (next < end).then_some(next);
        let Some(due) = ends.into_iter().chain(begins).min() else { break };
        tokio::select! {
            biased;
            _ = refresh.tick() => {
                let mut text = line(tally, begun);
                for UnderWay { fault, .. } in &under_way {
                    write!(text, "; {fault:?}")?;
                }
                match is_terminal {
                    true => {
                        let width = rustix::termios::tcgetwinsize(std::io::stdout()).map_or(80, |size| size.ws_col);
                        // In a second line it could not be taken off again.
                        let text: String = text.chars().take(usize::from(width).saturating_sub(1)).collect();
                        print!("{}{text}", fresh_line());
                        std::io::stdout().flush()?;
                    }
                    false => println!("{text}"),
                }
                continue;
            }
            () = sleep_until(due) => {}
        }
        if let Some(over) = under_way.iter().position(|fault| fault.until <= due) {
            let UnderWay { fault, .. } = under_way.swap_remove(over);
            fleet.end(fault).await.with_context(|| format!("mend {fault:?}"))?;
            continue;
        }
        next = Instant::now() + Duration::from_millis(random.u64(PAUSE_MS));
        let all: u32 = KINDS.iter().map(|(_, weight)| weight).sum();
        let mut choice = random.u32(..all);
        let chosen = |(_, weight): &(&str, u32)| match choice.checked_sub(*weight) {
            Some(rest) => {
                choice = rest;
                false
            }
            None => true,
        };
        let kind = KINDS.iter().position(chosen).unwrap_or_default();
        let (fault, target) = fault(kind, random.usize(..fleet.size()));
        let lasts = Duration::from_millis(if random.bool() { random.u64(SHORT_MS) } else { random.u64(LONG_MS) });
        if under_way.iter().all(|other| other.target != target) {
            if let Some(host) = target {
                fleet.supervise(host).await?;
            }
            fleet.begin(fault).await.with_context(|| format!("begin {fault:?}"))?;
            tally.faults[kind] += 1;
            under_way.push(UnderWay { until: (Instant::now() + lasts).min(end), fault, target });
        }
    }
    for host in 0..fleet.size() {
        fleet.supervise(host).await?;
    }
    Ok(())
}

/// How far it is.
fn line(tally: &Tally, begun: Instant) -> String {
    let seconds = begun.elapsed().as_secs();
    let faults = KINDS.iter().zip(&tally.faults).filter(|(_, count)| **count > 0);
    let faults: Vec<String> = faults.map(|((name, _), count)| format!("{count} {name}")).collect();
    format!("{:02}:{:02}  {} messages; {}", seconds / 60, seconds % 60, tally.mails, faults.join(", "))
}

/// Takes the line in a terminal off, so that another can be printed in its place.
fn fresh_line() -> &'static str {
    if std::io::stdout().is_terminal() { "\r\x1b[K" } else { "" }
}
