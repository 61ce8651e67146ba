//! The demo: a private nats-server, a host, the sample mails; every verdict, and where the time went.
//!
//! `cargo xtask demo` builds what it needs and runs it. The exit code is 0 only if every mail ended as exactly one
//! verdict or dead letter.

use anyhow::{Context as _, Result, bail, ensure};
use async_nats::jetstream;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};
use tests::streams::{self, Stored};
use tests::{Host, Metrics, NatsServer, asked_to_stop, command, eventually, tools};

const HELP: &str = "\
Shows Mailroom at work on the sample mails of tests/mails.

Usage: cargo xtask demo [--keep] [--nats-server PATH]

  --keep              Leave everything running until Ctrl-C, to play with
  --nats-server PATH  Use this nats-server
";

/// A handful of mails takes milliseconds; a machine that compiles beside it is slow.
const DEADLINE: Duration = Duration::from_secs(60);
/// The host's own grace period is 25 s.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
const CONSUMER: &str = "triage";
const SUBJECT: &str = "mail.demo";

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let mut keep = false;
    for arg in std::env::args().skip(1) {
        match arg.as_str() {
            "--keep" => keep = true,
            "--help" | "-h" => {
                print!("{HELP}");
                return ExitCode::SUCCESS;
            }
            _ => {
                eprintln!("error: {arg}: no such option; see --help");
                return ExitCode::from(2);
            }
        }
    }
    match run(keep).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whatever ends this, what it started is dropped, and so ended and removed.
async fn run(keep: bool) -> Result<()> {
    let (server, mut host) = tokio::select! {
        started = demo() => started?,
        () = asked_to_stop() => bail!("interrupted"),
    };
    if !keep {
        let status = host.stop(STOP_DEADLINE).await?;
        ensure!(status.success(), "the host did not stop in good order ({status})");
        return Ok(());
    }
    let (url, admin, program) = (server.url(), host.admin(), tools::host()?);
    println!("\nAll of it still runs. Ctrl-C ends and removes it. Try:");
    println!("  {} publish --server {url} --subject {SUBJECT} FILE…", program.display());
    println!("  {} verdicts --server {url}", program.display());
    println!("  curl {admin}/metrics");
    tokio::select! {
        () = asked_to_stop() => Ok(()),
        last_line = host.process().wait_for_end() => bail!("the host ended by itself; {last_line}"),
    }
}

async fn demo() -> Result<(NatsServer, Host)> {
    let files = tools::mails()?;
    let mut server = NatsServer::start().await?;
    server.process().quiet();
    let provisioned = command::host(["provision", "--server", server.url()]).await?;
    print!("{}", provisioned.success()?.stdout);
    let mut host = Host::on(server.url()).start().await?;
    host.process().quiet();
    println!("\nnats-server at {}, host at {}, both private to this demo\n", server.url(), host.admin());
    if let Err(err) = show(&server, &mut host, &files).await {
        let log = host.process().lines();
        eprintln!("the host's last lines:\n{}", log[log.len().saturating_sub(20)..].join("\n"));
        return Err(err);
    }
    Ok((server, host))
}

/// Publishes the mails and shows what became of them.
async fn show(server: &NatsServer, host: &mut Host, files: &[PathBuf]) -> Result<()> {
    host.until_ready(DEADLINE).await?;
    let mut publish = ["publish", "--server", server.url(), "--subject", SUBJECT].map(Into::into).to_vec();
    publish.extend(files.iter().map(|file| file.clone().into_os_string()));
    command::host(publish).await?.success()?;

    let jetstream = server.jetstream().await?;
    let settled = settled(&jetstream, files.len());
    tokio::select! {
        settled = settled => settled?,
        last_line = host.process().wait_for_end() => bail!("the host ended by itself; {last_line}"),
    }

    let mails = streams::messages(&jetstream, streams::MAIL).await?;
    let verdicts = streams::verdicts(&jetstream).await?;
    let dead = streams::dead_letters(&jetstream).await?;
    let outcomes = outcomes(&verdicts, &dead)?;
    let names = names(&mails, files)?;
    let rows: Vec<Row> = mails.iter().flat_map(|mail| rows(mail, &names, &outcomes)).collect();
    print_table(&rows);
    print_summary(&mails, &verdicts, &dead, &rows);
    // The shards hand their metrics over a few times a second.
    let seen = |metrics: &Metrics| metrics.get("mailroom_end_to_end_seconds_count", &[]) == Some(mails.len() as f64);
    print_times(&eventually(DEADLINE, "every mail in the metrics", async || host.metrics().await, seen).await?);

    for mail in &mails {
        let found = outcomes.get(&mail.sequence).map_or(0, Vec::len);
        ensure!(found == 1, "mail {} ended as {found} verdicts and dead letters, not one", names[&mail.sequence]);
    }
    ensure!(mails.len() == files.len(), "{} of {} mails are in the stream", mails.len(), files.len());
    ensure!(outcomes.len() == mails.len(), "there are verdicts or dead letters without a mail");
    Ok(())
}

/// Waits until the host has dealt with `mails` messages, acknowledgements included.
async fn settled(jetstream: &jetstream::Context, mails: usize) -> Result<()> {
    let mail = jetstream.get_stream(streams::MAIL).await.context("look up stream MAIL")?;
    let open = async || {
        let info = mail.consumer_info(CONSUMER).await.context("look up the consumer")?;
        let stored =
            streams::count(jetstream, streams::VERDICTS).await? + streams::count(jetstream, streams::DEAD).await?;
        Ok((stored, info.num_pending + info.num_ack_pending as u64))
    };
    let what = format!("{mails} mails are verdicts or dead letters (stored, still open)");
    eventually(DEADLINE, &what, open, |&(stored, open)| stored >= mails as u64 && open == 0).await?;
    Ok(())
}

/// What became of a mail.
enum Outcome<'a> {
    Verdict(&'a Stored),
    DeadLetter(&'a Stored),
}

/// Verdicts and dead letters by the sequence of their mail.
fn outcomes<'a>(verdicts: &'a [Stored], dead: &'a [Stored]) -> Result<BTreeMap<u64, Vec<Outcome<'a>>>> {
    let mut outcomes: BTreeMap<u64, Vec<Outcome>> = BTreeMap::new();
    for verdict in verdicts {
        outcomes.entry(verdict.mail_sequence()?).or_default().push(Outcome::Verdict(verdict));
    }
    for letter in dead {
        outcomes.entry(letter.mail_sequence()?).or_default().push(Outcome::DeadLetter(letter));
    }
    Ok(outcomes)
}

/// The file each mail of the stream came from, by sequence, found by content.
fn names(mails: &[Stored], files: &[PathBuf]) -> Result<BTreeMap<u64, String>> {
    let mut contents = Vec::new();
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        contents.push((name, Bytes::from(std::fs::read(file).with_context(|| format!("read {}", file.display()))?)));
    }
    let mut names = BTreeMap::new();
    for mail in mails {
        // Two files may be the same mail: each is used once.
        let name = match contents.iter().position(|(_, content)| *content == mail.payload) {
            Some(at) => contents.remove(at).0,
            None => format!("(message {})", mail.sequence),
        };
        names.insert(mail.sequence, name);
    }
    Ok(names)
}

/// A line of the table: one mail and what became of it.
struct Row {
    mail: String,
    priority: String,
    issue: String,
    queue: String,
    took: Option<Duration>,
    reason: String,
}

const REJECTED: &str = "rejected";

fn rows(mail: &Stored, names: &BTreeMap<u64, String>, outcomes: &BTreeMap<u64, Vec<Outcome>>) -> Vec<Row> {
    let found = outcomes.get(&mail.sequence).map_or(&[][..], Vec::as_slice);
    let name = names.get(&mail.sequence).cloned().unwrap_or_default();
    let rows = found.iter().map(|outcome| match outcome {
        Outcome::Verdict(stored) => {
            let verdict = stored.json().unwrap_or_default();
            let text = |pointer| verdict.pointer(pointer).and_then(|value| value.as_str()).unwrap_or("?").to_owned();
            let issue = format!("{} {}", text("/issue/kind"), text("/issue/id"));
            Row {
                mail: name.clone(),
                priority: text("/priority"),
                issue,
                queue: text("/queue"),
                took: took(mail, stored),
                reason: verdict.pointer("/reasons/0").and_then(|value| value.as_str()).unwrap_or_default().to_owned(),
            }
        }
        Outcome::DeadLetter(stored) => {
            let reason = stored.header("Mailroom-Detail").or(stored.header("Mailroom-Reason")).unwrap_or_default();
            Row {
                mail: name.clone(),
                priority: REJECTED.to_owned(),
                issue: "-".to_owned(),
                queue: "-".to_owned(),
                took: took(mail, stored),
                reason: reason.lines().next().unwrap_or_default().to_owned(),
            }
        }
    });
    rows.collect()
}

/// From the server's timestamp of the mail to that of what became of it.
fn took(mail: &Stored, outcome: &Stored) -> Option<Duration> {
    outcome.time.duration_since(mail.time).ok()
}

fn print_table(rows: &[Row]) {
    let head = ["mail", "priority", "issue", "queue", "ms", "first reason"].map(str::to_owned);
    let lines: Vec<[String; 6]> = rows
        .iter()
        .map(|row| {
            let ms = row.took.map_or_else(|| "?".to_owned(), |took| format!("{:.1}", took.as_secs_f64() * 1e3));
            let (mail, issue) = (shortened(&row.mail, 36), shortened(&row.issue, 28));
            [mail, row.priority.clone(), issue, row.queue.clone(), ms, shortened(&row.reason, 60)]
        })
        .collect();
    let width = |column: usize| {
        let cells = lines.iter().map(|line| &line[column]).chain([&head[column]]);
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: [usize; 6] = std::array::from_fn(width);
    for (number, line) in [&head].into_iter().chain(&lines).enumerate() {
        let mut text = String::new();
        for (column, cell) in line.iter().enumerate() {
            let width = widths[column];
            // Padded before it is coloured: escape sequences have no width.
            let cell = match column {
                4 => format!("{cell:>width$}"),
                5 => cell.clone(),
                _ => format!("{cell:<width$}"),
            };
            let colour = match (number, column, line[1].as_str()) {
                (0, ..) => "1",
                (_, 1, "urgent") => "1;31",
                (_, 1, "high") => "33",
                (_, 1, "low") => "2",
                (_, 1, REJECTED) => "35",
                _ => "",
            };
            text += &coloured(&cell, colour);
            text += "  ";
        }
        println!("{}", text.trim_end());
    }
}

fn print_summary(mails: &[Stored], verdicts: &[Stored], dead: &[Stored], rows: &[Row]) {
    let first = mails.iter().map(|mail| mail.time).min().unwrap_or(SystemTime::UNIX_EPOCH);
    let last = verdicts.iter().chain(dead).map(|stored| stored.time).max().unwrap_or(first);
    let span = last.duration_since(first).unwrap_or_default().as_secs_f64();
    let mut times: Vec<Duration> = rows.iter().filter_map(|row| row.took).collect();
    times.sort_unstable();
    let percentile = |percent: usize| {
        let rank = (times.len() * percent).div_ceil(100).max(1);
        times.get(rank - 1).copied().unwrap_or_default().as_secs_f64() * 1e3
    };
    let counted = |count: usize, word: &str| format!("{count} {word}{}", if count == 1 { "" } else { "s" });
    println!(
        "\n{}, {}, {}; {:.0} messages/s, p50 {:.1} ms, p99 {:.1} ms from mail to outcome",
        counted(mails.len(), "mail"),
        counted(verdicts.len(), "verdict"),
        counted(dead.len(), "dead letter"),
        if span > 0.0 { mails.len() as f64 / span } else { 0.0 },
        percentile(50),
        percentile(99),
    );
}

/// The host's histograms, in the order of a message's path.
const TIMES: [(&str, &str, &str); 6] = [
    ("mailroom_queue_wait_seconds", "queue wait", "fetched, until a slot was free"),
    ("mailroom_instantiate_seconds", "instantiate", "a fresh instance from the pool"),
    ("mailroom_guest_seconds", "guest", "reading the mail and making up its mind"),
    ("mailroom_publish_seconds", "publish", "the verdict, until the server had stored it"),
    ("mailroom_ack_seconds", "ack", "telling the server that the mail is done"),
    ("mailroom_end_to_end_seconds", "end to end", "all of it"),
];

fn print_times(metrics: &Metrics) {
    println!("\nWhere the time went, mean of each message, from the host's /metrics:");
    for (metric, name, meaning) in TIMES {
        match metrics.mean(metric) {
            Some(seconds) => println!("  {name:<11}  {:>8.3} ms  {meaning}", seconds * 1e3),
            None => println!("  {name:<11}         -     {metric} has seen nothing"),
        }
    }
    let mean = |metric| metrics.mean(metric).unwrap_or(0.0);
    let (sandbox, all) = (mean(TIMES[1].0) + mean(TIMES[2].0), mean(TIMES[5].0));
    if all > 0.0 {
        let share = (100.0 * sandbox / all).min(100.0);
        println!("The sandbox, made new for each mail, took {share:.0} % of a mail's time in the host.");
    }
}

fn shortened(text: &str, chars: usize) -> String {
    // What a guest wrote may hold control characters, which a terminal would obey.
    let clean = text.chars().map(|char| if char.is_control() { ' ' } else { char });
    match text.chars().count() {
        count if count > chars => clean.take(chars - 1).chain(['…']).collect(),
        _ => clean.collect(),
    }
}

fn coloured(text: &str, code: &str) -> String {
    let wanted = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    if wanted && !code.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}
