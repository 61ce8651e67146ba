//! A function of the executable's own in the place of a component: the same loop, sink and settlement, and no sandbox.
//! It is what the host is measured against.

use crate::cli::end;
use crate::handler::{Handler, PoolUse, Run, outcome};
use crate::run::{ConfigurationArgs, ServeArgs};
use anyhow::Result;
use clap::Parser;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

pub use crate::interface::{Failure, Issue, Message, Priority, Verdict};

/// Runs a native function on every message of a NATS JetStream stream, with `host run`'s flags and without its sandbox.
#[derive(Debug, Parser)]
#[command(max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    configuration: ConfigurationArgs,

    #[command(flatten)]
    serve: ServeArgs,
}

/// The whole of an executable: parses the command line, has `prepare` make a function of the operator's configuration,
/// and runs it on every message. Nothing bounds its time and memory, and when it panics its shard ends.
///
/// What `prepare` says is wrong with the configuration is the executable's last word.
pub fn main<F>(prepare: impl FnOnce(&[(String, String)]) -> Result<F, String>) -> ExitCode
where
    F: Fn(&Message) -> Result<Verdict, Failure> + Send + Sync + 'static,
{
    let Cli { configuration, serve } = Cli::parse();
    let handler = configuration.resolve().and_then(|pairs| prepare(pairs.pairs()).map_err(anyhow::Error::msg));
    end(handler.and_then(|function| serve.execute(Native { function: Arc::new(function), digest: "native".into() })))
}

struct Native<F> {
    function: Arc<F>,
    digest: Arc<str>,
}

impl<F> Handler for Native<F>
where
    F: Fn(&Message) -> Result<Verdict, Failure> + Send + Sync + 'static,
{
    type Call = Call<F>;

    fn name(&self) -> String {
        "native".to_string()
    }

    fn digest(&self) -> &Arc<str> {
        &self.digest
    }

    fn for_shard(&self, _number: u32) -> Result<Self> {
        Ok(Self { function: self.function.clone(), digest: (*self.digest).into() })
    }

    fn slots(&self) -> u32 {
        1
    }

    fn triage(self: &Arc<Self>, message: Arc<Message>) -> Call<F> {
        Call { native: self.clone(), message }
    }

    fn pool_use(&self) -> Option<PoolUse> {
        None
    }
}

/// A run, all of it at the first poll.
struct Call<F> {
    native: Arc<Native<F>>,
    message: Arc<Message>,
}

impl<F: Fn(&Message) -> Result<Verdict, Failure>> Future for Call<F> {
    type Output = Run;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Run> {
        let started = Instant::now();
        let outcome = outcome((self.native.function)(&self.message));
        Poll::Ready(Run { outcome, instantiate: Duration::ZERO, guest: started.elapsed() })
    }
}
