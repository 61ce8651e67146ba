//! Runs the properties of the unit tests for long, on values that no test run has tried.

use crate::step::{self, Result, Workspace};
use crate::{build, places};
use std::ffi::OsString;
use std::time::{SystemTime, UNIX_EPOCH};

/// What the properties' module is called, in every file that has one.
const MODULE: &str = "fuzz::";

/// As typed.
#[derive(Debug, PartialEq)]
pub struct Fuzz {
    minutes: u64,
    seed: Option<u64>,
    names: Vec<OsString>,
}

impl Fuzz {
    /// Reads `--minutes N`, `--seed N` and names of properties.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self> {
        let (mut minutes, mut seed, mut names) = (None, None, Vec::new());
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let mut number = |flag: &str| -> Result<u64> {
                let number = args.next().and_then(|number| number.to_str()?.parse().ok());
                number.ok_or_else(|| format!("{flag}: add a number"))
            };
            match arg.to_str() {
                Some("--minutes") => minutes = Some(number("--minutes")?),
                Some("--seed") => seed = Some(number("--seed")?),
                Some(flag) if flag.starts_with('-') => {
                    return Err(format!("fuzz {flag}: no such option; see `cargo xtask help`"));
                }
                _ => names.push(arg),
            }
        }
        let minutes = minutes.filter(|minutes| (1..=10_000).contains(minutes));
        Ok(Self { minutes: minutes.ok_or("fuzz: for how long? add --minutes N")?, seed, names })
    }

    /// Runs them side by side, each for its part of the time.
    pub fn execute(self, workspace: &Workspace) -> Result<()> {
        build(workspace)?;
        let names = if self.names.is_empty() { vec![MODULE.into()] } else { self.names };
        let test = |args: &[&str]| {
            let mut test =
                workspace.cargo(&["test", "--release", "--lib", "--package", "guest", "--package", "host", "--"]);
            test.args(&names).args(args).envs(places(workspace));
            test
        };
        let listed = step::output(&mut test(&["--list"]))?;
        let properties = listed.lines().filter(|line| line.contains(MODULE) && line.ends_with(": test")).count() as u64;
        if properties == 0 {
            return Err("no property has such a name".to_owned());
        }
        let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
        let seconds = (self.minutes * 60 * threads / properties.max(threads)).max(1);
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let seed = self.seed.unwrap_or_else(clock);
        eprintln!("seed {seed}: {properties} tests, at least {seconds} s each, {threads} at a time");
        let mut run = test(&["--nocapture"]);
        run.env("MAILROOM_FUZZ_SECONDS", seconds.to_string()).env("MAILROOM_FUZZ_SEED", seed.to_string());
        step::run("try the properties", run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_mean_what_the_help_says() {
        let parse = |args: &[&str]| Fuzz::parse(args.iter().map(OsString::from)).ok();
        let fuzz = |seed, names: &[&str]| Fuzz { minutes: 5, seed, names: names.iter().map(OsString::from).collect() };
        assert_eq!(parse(&["--minutes", "5"]), Some(fuzz(None, &[])));
        assert_eq!(parse(&["mbox", "--seed", "7", "--minutes", "5"]), Some(fuzz(Some(7), &["mbox"])));
        for wrong in [&[][..], &["--minutes"], &["--minutes", "0"], &["--minutes", "5", "--hours", "1"]] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }
}
