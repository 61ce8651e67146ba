//! What a message costs a host that has warmed up: its memory is mapped, and stays so, but no more than needed.

use rustix::process::Pid;
use std::collections::BTreeMap;
use std::fs;
use std::iter::repeat_n;
use std::path::Path;
use tests::bed::{Bed, SOON};
use tests::prelude::*;

/// Mails of one round.
const MAILS: u64 = 5000;

/// Rounds at most. The first is not counted: it touches the slots and buffers. One of the others has to be without
/// faults and calls.
const ROUNDS: usize = 6;

/// Messages that a shard holds at most: so few that the first rounds have them all at once. The heap of a thread grows
/// by a page at a time, until it has had room for as many as there ever are.
const IN_FLIGHT: &str = "64";

/// A mail that needs more memory than a slot may keep.
const LARGE_BYTES: usize = 500_000;

/// Most bytes of memory, and as many of tables, that a slot keeps mapped for the next message.
const KEPT_MAX_BYTES: f64 = 2.0 * 128.0 * 1024.0;

/// Most of the 30 pages with the triage's data that may be mapped for a small mail: the five it needs, and one more.
const DATA_MAX_KIB: u64 = 24;

/// Most page faults, and most system calls about memory, in a message.
const PER_MESSAGE: f64 = 0.01;

/// Messages that come one by one.
const ALONE: u64 = 20;

/// Time between them.
const PAUSE: Duration = Duration::from_millis(50);

/// Most times that the epoch's thread wakes up for one of them: it may take longer than a tick on a busy machine.
const WAKES_PER_MESSAGE: u64 = 5;

/// A fresh instance for every message, and no memory is mapped, unmapped or given back for it, and no page touched for
/// the first time: each of that would stop the other threads too.
#[tokio::test]
async fn messages_neither_fault_pages_nor_change_mappings() -> Result<()> {
    let strace = tools::installed("strace", "strace")?;
    let bed = Bed::new().await?;
    let log = bed.server.folder().join("strace");
    // As a grandchild of the test, so that the host's process is the one that the test has started.
    let words = ["-D", "-f", "--seccomp-bpf", "-e", "trace=%memory", "-e", "signal=none", "-o"];
    let traced = [strace.as_os_str()].into_iter().chain(words.iter().map(AsRef::as_ref)).chain([log.as_os_str()]);
    let mut host =
        Host::on(bed.server.url()).args(["--shards", "2", "--max-in-flight", IN_FLIGHT]).under(traced).start().await?;
    host.until_ready(SOON).await?;
    let shards = threads(host.process().id(), "shard")?;
    ensure!(shards.len() == 2, "shards: {shards:?}");

    publish(&bed, MAILS).await?;
    let mut before = Count::of(&shards, &log)?;
    // Else nothing was traced, and there is nothing to be proud of.
    ensure!(before.calls.values().sum::<u64>() > 10 && before.faults > 100, "at the start: {before:?}");
    let limit = (MAILS as f64 * PER_MESSAGE) as u64;
    let mut rounds = Vec::new();
    while rounds.len() < ROUNDS - 1 {
        publish(&bed, MAILS).await?;
        let now = Count::of(&shards, &log)?;
        let round = now.since(&before);
        if round.faults <= limit && round.calls.values().sum::<u64>() <= limit {
            return Ok(());
        }
        rounds.push(round);
        before = now;
    }
    bail!("for {MAILS} messages each: {rounds:?}")
}

/// A large mail leaves little behind in its slot: whatever stays mapped there is wiped again after every message.
#[tokio::test]
async fn a_large_mail_leaves_little_to_be_wiped() -> Result<()> {
    let bed = Bed::new().await?;
    let host = Host::on(bed.server.url()).args(["--shards", "1"]).start().await?;
    let kept = async || host.metrics().await?.get("mailroom_pool_kept_bytes", &[]).context("no figure");
    publish(&bed, 10).await?;
    let of_small_ones = kept().await?;
    ensure!(of_small_ones > 0.0, "nothing is kept of small mails");
    let mut mail = fs::read_to_string(tools::workspace().join("tests/mails/01-outage.eml"))?;
    mail.extend(repeat_n("Nothing works.\r\n", LARGE_BYTES / 16));
    bed.tell([mail]).await?;
    bed.settled().await?;
    let of_all = kept().await?;
    ensure!(of_all <= KEPT_MAX_BYTES, "kept: {of_small_ones} bytes, with a large mail {of_all}");
    Ok(())
}

/// What of its data every mail needs lies together: each page that is there, used or not, is looked at after each message.
#[tokio::test]
async fn a_small_mail_is_given_few_pages_of_the_guests_data() -> Result<()> {
    let bed = Bed::new().await?;
    let mut host = Host::on(bed.server.url()).args(["--slots", "1", "--shards", "1", "--no-cache"]).start().await?;
    host.until_ready(SOON).await?;
    publish(&bed, 10).await?;
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", host.process().id()))?;
    // Of the mappings of the compiled component only the slot's memory, which begins with its data, can be written to.
    let mut lines = smaps.lines().skip_while(|line| !(line.contains(" rw-p ") && line.contains("mailroom-cwasm")));
    let kib = lines.find_map(|line| line.strip_prefix("Rss:")).context("the slot's memory")?;
    let kib: u64 = kib.trim().trim_end_matches(" kB").parse()?;
    ensure!((4..=DATA_MAX_KIB).contains(&kib), "a small mail was given {kib} KiB; see xtask/src/guests.rs");
    Ok(())
}

/// The epoch ticks for guests that compute for long. Its thread sleeps otherwise.
#[tokio::test]
async fn the_epoch_stands_still_for_short_guests() -> Result<()> {
    let bed = Bed::new().await?;
    let mut host = Host::on(bed.server.url()).args(["--shards", "1"]).start().await?;
    host.until_ready(SOON).await?;
    publish(&bed, 1).await?;
    let threads = threads(host.process().id(), "epoch")?;
    let [epoch] = threads[..] else { bail!("threads of the epoch: {threads:?}") };
    let before = wakes(epoch)?;
    for _ in 0..ALONE {
        publish(&bed, 1).await?;
        tokio::time::sleep(PAUSE).await;
    }
    let woken = wakes(epoch)? - before;
    ensure!(woken <= ALONE * WAKES_PER_MESSAGE, "for {ALONE} messages the epoch's thread woke {woken} times");
    Ok(())
}

/// How often a thread went to sleep.
fn wakes(thread: Pid) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", thread.as_raw_nonzero()))?;
    let switches = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    Ok(switches.context("no count of switches")?.trim().parse()?)
}

/// Publishes so many mails of 1 KiB and waits for their verdicts.
async fn publish(bed: &Bed, mails: u64) -> Result<()> {
    let mut mail = fs::read_to_string(tools::workspace().join("tests/mails/01-outage.eml"))?;
    mail.extend(repeat_n('x', 1024 - mail.len()));
    bed.tell(repeat_n(&mail, mails as usize)).await?;
    bed.settled().await
}

/// The threads of a host whose names begin so.
fn threads(process: u32, name: &str) -> Result<Vec<Pid>> {
    let mut threads = Vec::new();
    for thread in fs::read_dir(format!("/proc/{process}/task"))? {
        let thread = thread?;
        if fs::read_to_string(thread.path().join("comm"))?.starts_with(name) {
            let id = thread.file_name().to_str().and_then(|id| Pid::from_raw(id.parse().ok()?));
            threads.push(id.context("a thread's id")?);
        }
    }
    Ok(threads)
}

/// What threads did with memory.
#[derive(Debug, Default)]
struct Count {
    /// Pages touched that had to be found or made by the kernel.
    faults: u64,
    /// System calls about mappings, by name.
    calls: BTreeMap<String, u64>,
}

impl Count {
    /// Since the start of `threads`; strace writes to `log`.
    fn of(threads: &[Pid], log: &Path) -> Result<Self> {
        let mut count = Self::default();
        let log = fs::read_to_string(log).with_context(|| format!("read {}", log.display()))?;
        for thread in threads {
            let id = thread.as_raw_nonzero();
            let stat = fs::read_to_string(format!("/proc/{id}/stat"))?;
            // The name, in parentheses, may hold blanks; `minflt` is the eighth field after it.
            let (_, fields) = stat.rsplit_once(')').context("a name in parentheses")?;
            count.faults += fields.split_whitespace().nth(7).context("minflt")?.parse::<u64>()?;
            let of_thread = log.lines().filter_map(|line| line.split_once(' ')).filter(|(of, _)| *of == id.to_string());
            for (name, _) in of_thread.filter_map(|(_, line)| line.trim_start().split_once('(')) {
                *count.calls.entry(name.to_owned()).or_default() += 1;
            }
        }
        Ok(count)
    }

    /// What was added after `before`.
    fn since(&self, before: &Self) -> Self {
        let calls = self.calls.iter().map(|(name, count)| {
            let earlier = before.calls.get(name).copied().unwrap_or_default();
            (name.clone(), count - earlier)
        });
        Self { faults: self.faults - before.faults, calls: calls.filter(|(_, count)| *count > 0).collect() }
    }
}
