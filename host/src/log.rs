//! The log: text on a terminal, JSON otherwise, written by a thread of its own so that a slow reader of standard
//! error never stalls the loop.

use crate::cli::{harmless, steers};
use anyhow::{Result, anyhow};
use std::fmt;
use std::io::{self, IsTerminal, Write};
use tracing::field::Field;
use tracing::level_filters::STATIC_MAX_LEVEL;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::field::MakeExt as _;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{Writer, debug_fn};
use tracing_subscriber::fmt::layer;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Lines kept for a slow reader; beyond them lines are dropped, never messages delayed. Room for a line takes 32 bytes
/// from the start.
const BUFFERED_LINES: usize = 4 << 10;

/// What is logged, and how.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Log")]
pub struct LogArgs {
    /// What to log: error, warn, info or debug, also by module: `info,host::settle=debug,guest=off`
    #[arg(long, value_name = "FILTER", env = "MAILROOM_LOG", default_value = "info")]
    log: String,

    /// How to log
    #[arg(long, value_enum, env = "MAILROOM_LOG_FORMAT", default_value = "auto")]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum LogFormat {
    /// Text on a terminal, JSON otherwise
    Auto,
    /// A line of text each
    Text,
    /// A JSON object on a line each
    Json,
}

impl LogArgs {
    /// Starts logging to standard error. What is buffered is written when the guard is dropped.
    ///
    /// # Errors
    /// A filter that is none.
    pub fn start(&self) -> Result<WorkerGuard> {
        // The client library tells of every connection at level info, and so does the host, in its own words.
        // What a guest does wrong with wasi:http it is told itself, however often it does so.
        let filter = format!("async_nats=warn,wasmtime_wasi_http=off,{}", self.log);
        // Not the filter that also knows spans: making its regular expressions takes a millisecond at every start.
        let filter: Targets = filter.parse().map_err(|err| anyhow!("--log {:?}: {err}", self.log))?;
        let beyond =
            filter.iter().map(|(_, level)| level).chain(filter.default_level()).any(|level| level > STATIC_MAX_LEVEL);
        let terminal = io::stderr().is_terminal();
        let json = match self.log_format {
            LogFormat::Auto => !terminal,
            LogFormat::Text => false,
            LogFormat::Json => true,
        };
        let (writer, guard) =
            NonBlockingBuilder::default().buffered_lines_limit(BUFFERED_LINES).thread_name("log").finish(io::stderr());
        let registry = tracing_subscriber::registry().with(filter);
        if json {
            let writer = move || Json(writer.clone());
            registry.with(layer().json().flatten_event(true).with_writer(writer)).init();
        } else {
            let fields = debug_fn(write_field).delimited(" ");
            let layer = layer().with_target(false).with_writer(writer).with_ansi(terminal).fmt_fields(fields);
            registry.with(layer).init();
        }
        if beyond {
            tracing::warn!("--log {:?}: this executable says no more than at level {STATIC_MAX_LEVEL}", self.log);
        }
        Ok(guard)
    }
}

/// Escapes what a terminal would act on and JSON takes as it is, for logs that are read on one.
struct Json<W>(W);

impl<W: Write> Write for Json<W> {
    /// Takes whole lines.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if line.is_ascii() {
            return self.0.write(line);
        }
        let mut text = String::with_capacity(line.len());
        for c in String::from_utf8_lossy(line).chars() {
            if steers(c) && !c.is_ascii() {
                text += &format!("\\u{:04x}", u32::from(c));
            } else {
                text.push(c);
            }
        }
        self.0.write_all(text.as_bytes())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Writes a field of a line of text. What guests and servers say must not steer a terminal.
fn write_field(writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    match field.name() {
        "message" => write!(writer, "{}", harmless(&format!("{value:?}"))),
        name => write!(writer, "{name}={}", harmless(&format!("{value:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_cannot_steer_a_terminal_and_says_the_same() {
        let said = "a\tb é \u{1b}[2J \u{9b}2J \u{202e}c";
        let mut json = Json(Vec::new());
        writeln!(json, "{}", serde_json::json!({ "message": said })).expect("written");
        let line = String::from_utf8(json.0).expect("text");
        assert!(line.trim_end().chars().all(|c| !steers(c)) && line.contains('é'), "{line}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&line).expect("JSON")["message"], said);
    }
}
