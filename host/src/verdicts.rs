//! `host verdicts`: prints what the verdict stream holds, for people and for scripts.

use crate::cli::{harmless, is_broken_pipe};
use crate::names::{NameArgs, check_name};
use crate::nats::{NatsArgs, read_stream, warn_if_refused};
use anyhow::{Context as _, Result, anyhow};
use async_nats::jetstream::Message;
use async_nats::jetstream::consumer::{DeliverPolicy, pull::OrderedConfig};
use futures::StreamExt;
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// How long the server may take to answer one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Print the stored verdicts
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  host verdicts                         all there are, oldest first
  host verdicts -f --since 0s           new ones as they come
  host verdicts --queue billing --json | jq .verdict.issue.id

With --json every line is {\"id\":…,\"time\":…,\"verdict\":{\"priority\":…,\"issue\":{\"kind\":…,\"id\":…},\"queue\":…,\"reasons\":[…]}}.")]
pub struct VerdictsArgs {
    /// Wait for new verdicts instead of stopping at the end
    #[arg(short, long, env = "MAILROOM_FOLLOW", value_parser = clap::builder::BoolishValueParser::new())]
    follow: bool,

    /// Stop after this many
    #[arg(long, value_name = "NUMBER", env = "MAILROOM_LIMIT")]
    limit: Option<u64>,

    /// Only verdicts for this queue
    #[arg(long, value_name = "QUEUE", env = "MAILROOM_QUEUE")]
    queue: Option<String>,

    /// Only verdicts stored in this time, such as 10m or 2days
    #[arg(long, value_name = "DURATION", env = "MAILROOM_SINCE", value_parser = humantime::parse_duration)]
    since: Option<Duration>,

    /// One JSON object a line
    #[arg(long, env = "MAILROOM_JSON", value_parser = clap::builder::BoolishValueParser::new())]
    json: bool,

    #[command(flatten)]
    nats: NatsArgs,

    #[command(flatten)]
    names: NameArgs,
}

impl VerdictsArgs {
    /// Prints verdicts until the end, or with --follow until Ctrl-C or until nobody reads them any more.
    ///
    /// # Errors
    /// No connection, no verdict stream, no permission to read it.
    pub async fn execute(self) -> Result<ExitCode> {
        tokio::select! {
            printed = self.print() => match printed {
                // `… | head -1` has what it wanted.
                Err(err) if is_broken_pipe(&err) => Ok(ExitCode::SUCCESS),
                result => result.map(|()| ExitCode::SUCCESS),
            },
            _ = tokio::signal::ctrl_c() => Ok(ExitCode::SUCCESS),
        }
    }

    async fn print(self) -> Result<()> {
        let names = self.names.resolve()?;
        let filter = match &self.queue {
            None => names.verdict_wildcard(),
            Some(queue) => {
                check_name("--queue", queue)?;
                names.verdicts_for(queue)
            }
        };
        let deliver_policy = match self.since {
            None => DeliverPolicy::All,
            Some(since) => DeliverPolicy::ByStartTime {
                start_time: SystemTime::now()
                    .checked_sub(since)
                    .map(OffsetDateTime::from)
                    .context("--since goes back further than time does")?,
            },
        };
        let nats = self.nats.resolve()?;
        let client = nats.connect("mailroom verdicts", warn_if_refused()).await?;
        let jetstream = nats.jetstream(client, REQUEST_TIMEOUT);
        let stream = &names.verdict_stream;
        let config = OrderedConfig { deliver_policy, filter_subject: filter, ..Default::default() };
        let consumer = read_stream(&jetstream, stream, config).await?;

        let mut printer = Printer::new(self.json);
        let mut left = self.limit.unwrap_or(u64::MAX);
        let is_empty = consumer.cached_info().num_pending == 0;
        if left == 0 || (is_empty && !self.follow) {
            return Ok(());
        }
        let mut messages = consumer.messages().await.with_context(|| format!("read stream {stream}"))?;
        while let Some(message) = messages.next().await {
            let message = message.with_context(|| format!("read stream {stream}"))?;
            let info = message.info().map_err(|err| anyhow!("read stream {stream}: {err}"))?;
            let (pending, stored) = (info.pending, info.published);
            left -= 1;
            // Only a pause in the flow is a reason to write: a full screen at a time is much faster.
            printer.print(&message, stored, pending == 0 || left == 0)?;
            if left == 0 || (pending == 0 && !self.follow) {
                break;
            }
        }
        Ok(())
    }
}

/// A verdict as the host stores it.
#[derive(Debug, Deserialize)]
struct Verdict {
    priority: String,
    issue: Issue,
    queue: String,
    reasons: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Issue {
    kind: String,
    id: String,
}

struct Printer {
    out: io::BufWriter<io::Stdout>,
    json: bool,
    /// The heading is still to come.
    heading: bool,
}

impl Printer {
    fn new(json: bool) -> Self {
        let out = io::stdout();
        let heading = !json && out.is_terminal();
        Self { out: io::BufWriter::new(out), json, heading }
    }

    fn print(&mut self, message: &Message, stored: OffsetDateTime, flush: bool) -> Result<()> {
        let header = |name: &str| message.headers.as_ref()?.get(name).map(async_nats::HeaderValue::as_str);
        let id = header("Mailroom-Id").or_else(|| message.subject.rsplit('.').next()).unwrap_or_default();
        let time = match header("Mailroom-Time") {
            Some(time) => time.to_owned(),
            None => stored.replace_nanosecond(0).unwrap_or(stored).format(&Rfc3339).context("write a time")?,
        };
        if std::mem::take(&mut self.heading) {
            self.out.write_all(row("TIME", "PRIORITY", "ISSUE", "QUEUE", "REASONS").as_bytes())?;
        }
        let line = if self.json { json(id, &time, &message.payload)? } else { text(&time, &message.payload) };
        self.out.write_all(line.as_bytes())?;
        if flush {
            self.out.flush()?;
        }
        Ok(())
    }
}

/// The verdict as it was stored, byte for byte but for line breaks, which JSON only has between its parts.
fn json(id: &str, time: &str, payload: &[u8]) -> Result<String> {
    let verdict = match (str::from_utf8(payload), serde_json::from_slice::<IgnoredAny>(payload)) {
        (Ok(verdict), Ok(_)) => Cow::Owned(verdict.replace(['\r', '\n'], " ")),
        _ => Cow::Borrowed("null"),
    };
    let (id, time) = (serde_json::to_string(id)?, serde_json::to_string(time)?);
    Ok(format!("{{\"id\":{id},\"time\":{time},\"verdict\":{verdict}}}\n"))
}

fn text(time: &str, payload: &[u8]) -> String {
    match serde_json::from_slice::<Verdict>(payload) {
        Ok(Verdict { priority, issue, queue, reasons }) => {
            row(time, &priority, &format!("{} {}", issue.kind, issue.id), &queue, &reasons.join("; "))
        }
        Err(err) => row(time, "?", "?", "?", &format!("not a verdict: {err}")),
    }
}

fn row(time: &str, priority: &str, issue: &str, queue: &str, reasons: &str) -> String {
    let [time, priority, issue, queue, reasons] = [time, priority, issue, queue, reasons].map(harmless);
    format!("{time:<24}  {priority:<8}  {issue:<28}  {queue:<16}  {reasons}").trim_end().to_owned() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAYLOAD: &str =
        r#"{"priority":"high","issue":{"kind":"new","id":"I-1"},"queue":"billing","reasons":["a","b\u001b[2J"]}"#;

    #[test]
    fn rows_are_aligned_and_cannot_steer_a_terminal() {
        let line = text("2026-11-21T10:00:00Z", PAYLOAD.as_bytes());
        assert_eq!(
            line,
            "2026-11-21T10:00:00Z      high      new I-1                       billing           a; b\\u{1b}[2J\n"
        );
        assert!(text("t", b"nonsense").contains("not a verdict"));
    }

    #[test]
    fn json_lines_carry_the_verdict_as_stored() {
        assert_eq!(
            json("MAIL:1:triage:5", "2026-11-21T10:00:00Z", PAYLOAD.as_bytes()).expect("json"),
            format!("{{\"id\":\"MAIL:1:triage:5\",\"time\":\"2026-11-21T10:00:00Z\",\"verdict\":{PAYLOAD}}}\n")
        );
        let spread = json("a\"b", "t", b"{\n\"queue\": \"x\"\r\n}").expect("json");
        assert_eq!(spread, "{\"id\":\"a\\\"b\",\"time\":\"t\",\"verdict\":{ \"queue\": \"x\"  }}\n");
        assert_eq!(json("a", "t", b"{").expect("json"), "{\"id\":\"a\",\"time\":\"t\",\"verdict\":null}\n");
    }
}
