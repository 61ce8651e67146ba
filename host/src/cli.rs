//! The command line as typed. Each command's own arguments stand in the module that carries it out.

use crate::dead::DeadArgs;
use crate::provision::ProvisionArgs;
use crate::publish::PublishArgs;
use crate::run::RunArgs;
use crate::triage::TriageArgs;
use crate::verdicts::VerdictsArgs;
use anyhow::{Context as _, Result};
use clap::builder::{BoolishValueParser, TypedValueParser as _};
use clap::error::ErrorKind;
use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write as _};
use std::process::ExitCode;

/// Runs a WebAssembly component on every message of a NATS JetStream stream, a fresh sandboxed instance each.
#[derive(Debug, Parser)]
#[command(name = "host", version, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// The arguments of a command are only made when it is the one that was typed, which shortens every start. What `--help`
/// says of it has to stand in both places then, here and at its arguments.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
enum Command {
    /// Fetch messages and run the component on each: the loop
    Run(Box<RunArgs>),

    /// Create or check the streams, the consumer and the key-value bucket
    Provision(Box<ProvisionArgs>),

    /// Put mails from files, mbox files, Maildirs or standard input into the stream
    Publish(Box<PublishArgs>),

    /// Print the stored verdicts
    Verdicts(Box<VerdictsArgs>),

    /// List, show, run again or remove dead letters: messages that got no verdict
    Dead(DeadArgs),

    /// Print the verdicts on mails from disk, without NATS
    Triage(Box<TriageArgs>),

    /// Compile a component to machine code, or make a component of a core module
    #[cfg(feature = "compile")]
    Compile(crate::component::CompileArgs),

    /// Show what a component imports and exports, and what it would need to be granted
    #[cfg(feature = "compile")]
    Inspect(crate::component::InspectArgs),

    /// Make a container image of a component, without a container engine
    #[cfg(feature = "compile")]
    Image(Box<crate::image::ImageArgs>),

    /// Tell KEDA how many hosts there should be: an external scaler
    #[cfg(feature = "scaler")]
    Scaler(Box<crate::scaler::ScalerArgs>),

    /// Print a completion script for your shell
    Completions {
        /// The shell to complete in
        shell: clap_complete::Shell,
    },
}

impl Cli {
    /// Reads the process's arguments and environment; prints help, `version` or an error and ends the process if that
    /// is all there is to do.
    ///
    /// `host publish` ends with 64 then, which mail servers know as a wrong command line, all others with 2.
    fn from_command_line(version: &'static str) -> Self {
        let mut command = Self::command().long_version(version);
        let matches = command.try_get_matches_from_mut(std::env::args_os()).or_else(|err| {
            if !err.use_stderr() {
                return Err(err);
            }
            // Only now, since it takes a start's worth of time.
            command.build();
            command = without_denied(std::mem::take(&mut command));
            command.try_get_matches_from_mut(std::env::args_os())
        });
        let cli = matches.and_then(|matches| Self::from_arg_matches(&matches).map_err(|err| err.format(&mut command)));
        cli.unwrap_or_else(|err| {
            // Without a terminal or a reader there is nobody to tell.
            let _ = err.print();
            let is_publish = std::env::args_os().nth(1).is_some_and(|command| command == "publish");
            std::process::exit(match err.exit_code() {
                2 if is_publish => 64,
                code => code,
            })
        })
    }

    /// Carries out the command.
    ///
    /// # Errors
    /// Whatever kept the command from its work, with the remedy where there is one.
    fn execute(self) -> Result<ExitCode> {
        match self.command {
            Command::Run(args) => args.execute(),
            Command::Provision(args) => runtime()?.block_on(args.execute()),
            Command::Publish(args) => Ok(runtime()?.block_on(args.execute())),
            Command::Verdicts(args) => runtime()?.block_on(args.execute()),
            Command::Dead(args) => runtime()?.block_on(args.execute()),
            Command::Triage(args) => args.execute(),
            #[cfg(feature = "compile")]
            Command::Compile(args) => args.execute(),
            #[cfg(feature = "compile")]
            Command::Inspect(args) => args.execute(),
            #[cfg(feature = "compile")]
            Command::Image(args) => args.execute(),
            #[cfg(feature = "scaler")]
            Command::Scaler(args) => args.execute(),
            Command::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Self::command(), "host", &mut script);
                print(&script)?;
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

/// The command, where a flag that its variable denies, as in `MAILROOM_CHECK=0`, contradicts no other flag: clap looks
/// whether it is given, not what it says.
fn without_denied(command: clap::Command) -> clap::Command {
    let is_no =
        |value: OsString| matches!(BoolishValueParser::new().parse(&clap::Command::default(), None, value), Ok(false));
    let command = command.mut_args(|arg| {
        let value = arg.get_env().filter(|_| matches!(arg.get_action(), ArgAction::SetTrue)).and_then(std::env::var_os);
        if value.is_some_and(is_no) { arg.env(None::<&'static str>) } else { arg }
    });
    command.mut_subcommands(without_denied)
}

/// Arguments that are well formed, each for itself, and make no sense: the process says so and ends as for others that it
/// does not understand.
pub(crate) fn wrong_usage(err: anyhow::Error) -> anyhow::Error {
    clap::Error::raw(ErrorKind::ValueValidation, format!("{err:#}\n")).into()
}

/// Where a pod's process leaves its last words, which Kubernetes then shows in the pod's status.
const TERMINATION_LOG: &str = "/dev/termination-log";

/// Kubernetes cuts a termination message off there, in bytes.
const TERMINATION_LOG_BYTES: usize = 4096;

/// The whole of the executable: parses the command line, carries out the command, says what went wrong. `version` is
/// what it says to `--version`.
pub fn main(version: &'static str) -> ExitCode {
    end(Cli::from_command_line(version).execute())
}

/// Says what went wrong, if something did, and gives the exit code.
pub(crate) fn end(result: Result<ExitCode>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(err) => match err.downcast::<clap::Error>() {
            Ok(wrong_usage) => {
                // Without a reader there is nobody to tell.
                let _ = wrong_usage.print();
                ExitCode::from(2)
            }
            Err(err) => {
                let message = format!("error: {err:#}");
                let _ = writeln!(io::stderr(), "{message}");
                leave_last_words(&message);
                ExitCode::FAILURE
            }
        },
    }
}

/// Writes `message` where Kubernetes looks for it; outside of a pod there is no such file.
fn leave_last_words(message: &str) {
    if let Ok(mut file) = File::options().write(true).open(TERMINATION_LOG) {
        let end = message.floor_char_boundary(TERMINATION_LOG_BYTES);
        // It is on standard error too, and there is nobody else to tell.
        let _ = file.write_all(&message.as_bytes()[..end]);
    }
}

/// What commands run on: one thread, this one.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")
}

/// Prints to standard output. A reader that went away, as in `… | head -1`, has what it wanted: no error.
pub(crate) fn print(text: impl AsRef<[u8]>) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_ref()).and_then(|()| out.flush()) {
        Err(err) if err.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("write to standard output"),
    }
}

/// Whether `err` is of a reader that went away.
pub(crate) fn is_broken_pipe(err: &anyhow::Error) -> bool {
    err.downcast_ref::<io::Error>().is_some_and(|err| err.kind() == io::ErrorKind::BrokenPipe)
}

/// A number of things: `1 letter`, `3 letters`.
pub(crate) fn counted(number: u64, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

/// `text` for a terminal: a stranger's mail, and a guest's words about it, must not steer it.
pub(crate) fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if steers(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Whether a terminal acts on it: control characters, and the marks that change the direction of what follows.
pub(crate) fn steers(c: char) -> bool {
    let mark = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    mark || c.is_control()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_steer_a_terminal() {
        assert_eq!(harmless("a\tb\u{202e}c\u{1b}[2J"), "a\\tb\\u{202e}c\\u{1b}[2J");
    }

    /// A flag that contradicts or needs one that does not exist only shows when somebody uses it.
    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        let about = |command: &clap::Command| -> Vec<Option<String>> {
            command.get_subcommands().map(|command| command.get_about().map(ToString::to_string)).collect()
        };
        let mut command = Cli::command();
        let listed = about(&command);
        command.build();
        assert_eq!(about(&command)[..listed.len()], listed, "what a command says of itself, and what all say of it");
    }
}
