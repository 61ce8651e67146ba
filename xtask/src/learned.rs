//! A model to measure and to test with: of full size, and the same every time.

use crate::guests;
use crate::step::{self, Result, Workspace};
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

/// So many queues, as a middling support team has.
const QUEUES: u64 = 10;
/// Mails of each to learn from.
const MAILS: u64 = 40;
/// Words of each mail.
const WORDS: u64 = 200;
/// Words that the mails are made of, beside those of the sample mails.
const VOCABULARY: u64 = 4_000;

/// Learns a model from mails that are made up, and builds the component `triage-learned` with it. The mails have the
/// words of the sample mails in `tests/mails`, so that a model knows what it is asked about.
///
/// Returns the model.
pub fn build(workspace: &Workspace) -> Result<PathBuf> {
    let folder = workspace.target.join("learned");
    fs::create_dir_all(&folder).map_err(|err| format!("create {}: {err}", folder.display()))?;
    let model = folder.join("model.bin");
    let mut train = workspace.command(workspace.target.join("release/train"));
    train.arg("--out").arg(&model);
    let known = sample_words(workspace)?;
    for queue in 0..QUEUES {
        let file = folder.join(format!("q{queue}.mbox"));
        fs::write(&file, mails(queue, &known)).map_err(|err| format!("write {}: {err}", file.display()))?;
        train.arg(format!("q{queue}={}", file.display()));
    }
    step::run("learn a model from mails that are made up", train)?;
    guests::build_learned(workspace, &model)?;
    Ok(model)
}

fn sample_words(workspace: &Workspace) -> Result<Vec<String>> {
    let folder = workspace.root.join("tests/mails");
    let entries = fs::read_dir(&folder).map_err(|err| format!("read {}: {err}", folder.display()))?;
    let mut words = Vec::new();
    for entry in entries.flatten() {
        let mail = fs::read(entry.path()).map_err(|err| format!("read {}: {err}", entry.path().display()))?;
        let mail = String::from_utf8_lossy(&mail).into_owned();
        words.extend(mail.split(|c: char| !c.is_ascii_alphabetic()).filter(|word| word.len() > 1).map(str::to_owned));
    }
    words.sort();
    words.dedup();
    Ok(words)
}

/// An mbox file.
fn mails(queue: u64, known: &[String]) -> String {
    let mut text = String::new();
    let mut state = queue + 1;
    let mut random = |below: u64| {
        // A linear congruential generator with Knuth's constants: the same in every run.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for number in 0..MAILS {
        let (day, writer) = (1 + number % 28, random(20));
        let written = write!(
            text,
            "From w@example.org Mon Mar {day} 10:00:00 2026\nDate: {day} Mar 2026 10:00:00 +0000\n\
             From: w{writer}@q{queue}.example.org\nSubject: about w{}\n\n",
            random(VOCABULARY)
        );
        debug_assert!(written.is_ok());
        for _ in 0..WORDS {
            // A third are words of the samples. Of the others every queue has some more often.
            match random(3) {
                0 => text += &known[random(known.len() as u64) as usize],
                1 => text += &format!("w{}", random(VOCABULARY / QUEUES) * QUEUES + queue),
                _ => text += &format!("w{}", random(VOCABULARY)),
            }
            text.push(' ');
        }
        text += "\n\n";
    }
    text
}
