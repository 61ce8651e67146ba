//! `host triage`: verdicts on mails from disk, without NATS.

use crate::cli::runtime;
use crate::component::CacheArgs;
use crate::handler::{Failure, Handler as _};
use crate::interface::{Issue, JsonVerdict, Message, Verdict, priority_name};
use crate::log::LogArgs;
use crate::mails::{Format, Mail, mails};
use crate::pool::{Guest, Pools};
use crate::run::GuestArgs;
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Print the verdicts on mails from disk, without NATS
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  host triage triage.wasm mail.eml
  host triage triage.wasm --config queue.default=helpdesk Maildir/ archive.mbox
  curl -s https://example.com/mail.eml | host triage triage.wasm -

Exit codes: 0 a verdict on every mail, 1 no verdict on some, or nothing could be run, 2 wrong
usage.")]
pub struct TriageArgs {
    /// The component: a .wasm, or a .cwasm from `host compile`
    component: PathBuf,

    /// Mails: .eml files, mbox files, Maildirs, folders; `-` is standard input
    #[arg(required = true)]
    files: Vec<PathBuf>,

    /// What the files are
    #[arg(long, value_enum, default_value_t, env = "MAILROOM_FORMAT")]
    format: Format,

    /// Print a JSON verdict a line; so it is when piped
    #[arg(long, env = "MAILROOM_JSON", value_parser = clap::builder::BoolishValueParser::new())]
    json: bool,

    /// With --json: name the mail and say what happened to it, `{"mail":…,"verdict":{…}}` a line
    #[arg(long, env = "MAILROOM_NAMES", value_parser = clap::builder::BoolishValueParser::new(), requires = "json")]
    names: bool,

    #[command(flatten)]
    guest: GuestArgs,

    #[command(flatten)]
    cache: CacheArgs,

    #[command(flatten)]
    log: LogArgs,
}

impl TriageArgs {
    /// Carries out `host triage`.
    ///
    /// # Errors
    /// A component that is no guest, or output that cannot be written. A mail without a verdict is no error: it is
    /// reported on standard error, and the exit code is 1.
    pub fn execute(&self) -> Result<ExitCode> {
        let _log = self.log.start()?;
        let (grants, limits) = self.guest.resolve(Some(1))?;
        ensure!(grants.keyvalue.nats().is_none(), "no server is asked here; use --keyvalue memory");
        let pool = Pools::new(&limits, 1)?.of_shard(0)?;
        let loaded = Arc::new(self.cache.load(pool.engine(), &self.component, None)?);
        let guest = Arc::new(Guest::new(pool, loaded, &grants)?);
        let runtime = runtime()?;
        runtime.block_on(guest.try_out())?;

        let mut out = std::io::stdout().lock();
        let json = self.json || !out.is_terminal();
        let mut complete = true;
        for (number, mail) in (1..).zip(mails(&self.files, self.format)) {
            let (name, outcome) = match mail {
                Ok(Mail { name, data }) => {
                    let run = runtime.block_on(guest.triage(Arc::new(message(number, data))));
                    (name, run.outcome.map_err(|failure| explain(&failure)))
                }
                Err(err) => (err.name().to_string(), Err(err.to_string())),
            };
            if let Err(failure) = &outcome {
                complete = false;
                if failure.starts_with(&name) {
                    eprintln!("error: {failure}");
                } else {
                    eprintln!("error: {name}: {failure}");
                }
            }
            let written = match (&outcome, json) {
                (Ok(verdict), true) if self.names => {
                    writeln!(out, "{}", json!({ "mail": name, "verdict": JsonVerdict::from(verdict) }))
                }
                (Err(failure), true) if self.names => writeln!(out, "{}", json!({ "mail": name, "failure": failure })),
                (Ok(verdict), true) => out.write_all(&verdict.to_json()).and_then(|()| writeln!(out)),
                (Ok(verdict), false) => show(&mut out, &name, verdict),
                (Err(_), _) => Ok(()),
            };
            match written {
                Err(err) if err.kind() == std::io::ErrorKind::BrokenPipe => break,
                written => written.context("write to standard output")?,
            }
        }
        Ok(if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// The mail as a message that came from no stream.
fn message(number: u64, data: Vec<u8>) -> Message {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Message {
        id: format!("file:0:triage:{number}"),
        subject: "mail.file".into(),
        headers: Vec::new(),
        time: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
        attempt: 1,
        data,
    }
}

fn explain(failure: &Failure) -> String {
    match failure {
        Failure::Rejected(reason) => format!("rejected: {reason}"),
        Failure::Retry(_, reason) => format!("to be tried again: {reason}"),
        Failure::Broken(fault, detail) => format!("{}: {detail}", fault.name()),
    }
}

fn show(out: &mut impl Write, name: &str, verdict: &Verdict) -> std::io::Result<()> {
    let (kind, id) = match &verdict.issue {
        Issue::New(id) => ("new", id),
        Issue::Existing(id) => ("existing", id),
    };
    writeln!(out, "{name}")?;
    writeln!(out, "  {} priority, queue {}, {kind} issue {id}", priority_name(verdict.priority), verdict.queue)?;
    verdict.reasons.iter().try_for_each(|reason| writeln!(out, "  - {reason}"))
}
