//! The log: text on a terminal, JSON otherwise, written by a thread of its own so that a slow reader of standard
//! error never stalls the loop.

use anyhow::{Result, anyhow};
use std::io::IsTerminal;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

/// Lines kept for a slow reader; beyond them lines are dropped, never messages delayed.
const BUFFERED_LINES: usize = 64 << 10;

/// What is logged, and how.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Log")]
pub struct LogArgs {
    /// What to log: error, warn, info, debug or trace, also by module: `info,host::settle=debug,guest=off`
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
        let filter = format!("async_nats=warn,{}", self.log);
        let filter = EnvFilter::try_new(filter).map_err(|err| anyhow!("--log {:?}: {err}", self.log))?;
        let terminal = std::io::stderr().is_terminal();
        let json = match self.log_format {
            LogFormat::Auto => !terminal,
            LogFormat::Text => false,
            LogFormat::Json => true,
        };
        let (writer, guard) = NonBlockingBuilder::default()
            .buffered_lines_limit(BUFFERED_LINES)
            .thread_name("log")
            .finish(std::io::stderr());
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_target(false);
        if json {
            log.json().flatten_event(true).with_target(true).init();
        } else {
            log.with_ansi(terminal).init();
        }
        Ok(guard)
    }
}
