//! Learns a model from labelled mails and says how good it is.

use guest::mail::Mail;
use guest::model::Model;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use train::corpus::{self, Labelled};
use train::learn::learn;
use train::score::Score;

const HELP: &str = "\
Learns from labelled mails who takes which, and writes a model for the triage.

Usage: train --out MODEL [OPTIONS] MAILS…

Mails:
  LABEL=FILE.mbox       All mails of an mbox file, which have this label
  FILE.jsonl            Lines of JSON with the members `file`, a path beside the list, and `label`

Options:
  --out MODEL           Where the model goes
  --label MEMBER        The member with the label in lines of JSON [default: label]
  --test PERCENT        Keep so many of the newest mails of each label to test with, 0 to 50 [default: 20]. The
                        model that is written has learned from the others only
  --balanced            Of two labels the rarer one matters as much as the other: for priorities
  --help                Print this

A label is the name of a queue, or for a model of priorities one of low, normal, high, urgent. A model is put into the
component with `MAILROOM_TEAM_MODEL=MODEL cargo xtask build`, or MAILROOM_PRIORITY_MODEL.
";

fn main() -> ExitCode {
    match Order::parse(std::env::args().skip(1)).and_then(|order| order.map_or(Ok(()), |order| order.execute())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// As typed.
struct Order {
    out: PathBuf,
    label: String,
    test: usize,
    balanced: bool,
    mails: Vec<String>,
}

impl Order {
    /// None: help was asked for and given.
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Option<Order>, String> {
        let (mut out, mut label, mut test, mut balanced) = (None, "label".to_owned(), 20, false);
        let mut mails = Vec::new();
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{arg}: add a value"));
            match arg.as_str() {
                "--help" | "-h" => {
                    print!("{HELP}");
                    return Ok(None);
                }
                "--out" => out = Some(PathBuf::from(value()?)),
                "--label" => label = value()?,
                "--test" => {
                    let percent = value()?.parse().ok().filter(|percent| *percent <= 50);
                    test = percent.ok_or("--test: add 0 to 50")?;
                }
                "--balanced" => balanced = true,
                _ if arg.starts_with('-') => return Err(format!("{arg}: no such option; see --help")),
                _ => mails.push(arg),
            }
        }
        if mails.is_empty() {
            return Err("no mails to learn from; see --help".to_owned());
        }
        Ok(Some(Order { out: out.ok_or("where does the model go? add --out")?, label, test, balanced, mails }))
    }

    fn execute(self) -> Result<(), String> {
        let mut mails = Vec::new();
        for source in &self.mails {
            mails.extend(match source.split_once('=') {
                Some((label, file)) => corpus::mbox(Path::new(file), label)?,
                None => corpus::json_lines(Path::new(source), &self.label)?,
            });
        }
        let mut labels: Vec<String> = mails.iter().map(|mail| mail.label.clone()).collect();
        labels.sort();
        labels.dedup();
        let number = |label: &String| labels.iter().position(|known| known == label).unwrap_or(0);
        let (learned_from, kept) = corpus::split(mails, 100 - self.test);
        let examples: Vec<(&[u8], usize)> =
            learned_from.iter().map(|mail| (&mail.data[..], number(&mail.label))).collect();
        let learned = learn(&examples, &labels, self.balanced)?;
        let pairs = if learned.pairs { ", pairs of words" } else { "" };
        let people = if learned.people { ", people" } else { "" };
        println!(
            "learned from {} mails, {} labels, cost {}{pairs}{people}",
            examples.len(),
            labels.len(),
            learned.cost
        );
        let validated = &learned.validated;
        println!("cross-validation: accuracy {:.3}, macro-F1 {:.3}", validated.accuracy(), validated.macro_f1());
        let model = Model::read(&learned.model)?;
        if !kept.is_empty() {
            let guess = |mail: &Labelled| {
                let mail = Mail::read(&mail.data).ok()?;
                Some(model.guess(&mail))
            };
            let guesses: Vec<_> = kept.iter().map(guess).collect();
            let sure = guesses.iter().flatten().filter(|guess| guess.confidence >= model.threshold()).count();
            let guessed: Vec<usize> =
                guesses.iter().map(|guess| guess.as_ref().map_or(0, |guess| number(&guess.label.to_owned()))).collect();
            let truth: Vec<usize> = kept.iter().map(|mail| number(&mail.label)).collect();
            let score = Score::of(&guessed, &truth, labels.len());
            println!(
                "{} newer mails: accuracy {:.3}, macro-F1 {:.3}, sure of {sure}\n",
                kept.len(),
                score.accuracy(),
                score.macro_f1()
            );
            println!("{}", score.table(&labels));
        }
        std::fs::write(&self.out, &learned.model).map_err(|error| format!("write {}: {error}", self.out.display()))?;
        println!("{}: {} bytes", self.out.display(), learned.model.len());
        Ok(())
    }
}
