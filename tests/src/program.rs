use crate::wait::asked_to_stop;
use anyhow::{Result, anyhow};
use std::process::ExitCode;

/// Runs a program to its exit code: 0 when `run` succeeds or only help is wanted, 1 when it fails or somebody stops it, 2
/// when the arguments are wrong. `wanted` is what they say; nothing if help is wanted.
pub async fn program<W>(help: &str, wanted: Result<Option<W>>, run: impl AsyncFnOnce(W) -> Result<()>) -> ExitCode {
    let wanted = match wanted {
        Ok(Some(wanted)) => wanted,
        Ok(None) => {
            print!("{help}");
            return ExitCode::SUCCESS;
        }
        Err(err) => {
            eprintln!("error: {err:#}; see --help");
            return ExitCode::from(2);
        }
    };
    let ended = tokio::select! {
        ended = run(wanted) => ended,
        () = asked_to_stop() => Err(anyhow!("interrupted")),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("\nerror: {err:#}");
            ExitCode::FAILURE
        }
    }
}
