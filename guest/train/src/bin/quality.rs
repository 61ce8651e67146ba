//! How good the triage is on real mail: `cargo xtask quality --data DIR`.
//!
//! It runs the library `guest`, which is what the components are built from, natively; and has the host run the
//! component on a part of the mails, to see that both say the same. What each figure means is told in `docs/triage.md`.

use guest::mail::Mail;
use guest::memory::Map;
use guest::model::Model;
use guest::{Issue, Rules, triage, triage_with};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use train::corpus::{self, Labelled};
use train::learn::learn;
use train::score::{Score, share};

/// As many mails are also run through the component.
const SAMPLE: usize = 300;

fn main() -> ExitCode {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [data, host, component] = &args[..] else {
        eprintln!("error: usage: quality DATA HOST COMPONENT, as `cargo xtask quality` calls it");
        return ExitCode::FAILURE;
    };
    match measure(data, host, component) {
        Ok(table) => {
            print!("{table}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(data: &Path, host: &Path, component: &Path) -> Result<String, String> {
    let folder = Unpacked::new(data, &["bugs", "teams", "bulk"])?;
    let mut table = Table::default();
    let bugs = bugs(&folder.path.join("bugs"))?;
    let teams = teams(&folder.path.join("teams"))?;

    let cut = |mails: &[Threaded]| mails.iter().map(Threaded::without_references).collect::<Vec<_>>();
    table.issues("issue, headers present: bugs", &bugs, "in In-Reply-To: 0.96", "F1 ≥ 0.99")?;
    table.issues("issue, headers present: teams", &teams, "", "")?;
    table.issues("issue, no reference headers: bugs", &cut(&bugs), "P 0.991 R 0.981", "P, R ≥ 0.99")?;
    table.issues("issue, no reference headers: teams", &cut(&teams), "P 0.808 R 0.679", "P ≥ 0.90 R ≥ 0.70")?;
    table.teams(&teams)?;
    table.severity(&folder.path.join("bugs"))?;
    table.spam(&folder.path.join("bulk"))?;
    let agreement = agreement(&teams, &bugs, host, component)?;
    Ok(format!(
        "\nMeasured with the native library `guest`, from which the components are built. {agreement}\n\n{}",
        table.text()
    ))
}

/// A mail and the thread that it truly belongs to.
struct Threaded {
    mail: Labelled,
    thread: String,
}

impl Threaded {
    /// The same mail without `In-Reply-To` and `References`.
    fn without_references(&self) -> Threaded {
        let mut kept = Vec::with_capacity(self.mail.data.len());
        let (mut in_header, mut drops) = (true, false);
        for line in self.mail.data.split_inclusive(|&byte| byte == b'\n') {
            if in_header {
                in_header = !line.trim_ascii().is_empty();
                if !matches!(line.first(), Some(b' ' | b'\t')) {
                    let name = line.split(|&byte| byte == b':').next().unwrap_or_default().trim_ascii();
                    drops = [&b"in-reply-to"[..], b"references"].iter().any(|known| name.eq_ignore_ascii_case(known));
                }
                if in_header && drops {
                    continue;
                }
            }
            kept.extend_from_slice(line);
        }
        Threaded { mail: Labelled { data: kept, ..self.mail.clone() }, thread: self.thread.clone() }
    }
}

/// The mails of bug reports in order of time; all of one bug are a thread.
fn bugs(folder: &Path) -> Result<Vec<Threaded>, String> {
    let rows = corpus::rows(&folder.join("labels.jsonl"))?;
    let mut mails = rows
        .iter()
        .map(|row| {
            let mail = labelled(folder, row)?;
            Ok(Threaded { mail, thread: row["bug"].to_string() })
        })
        .collect::<Result<Vec<_>, String>>()?;
    mails.sort_by(|a, b| (a.mail.time, &a.mail.name).cmp(&(b.mail.time, &b.mail.name)));
    Ok(mails)
}

/// The mails of the teams in order of time; all that refer to each other, directly or by others, are a thread.
fn teams(folder: &Path) -> Result<Vec<Threaded>, String> {
    let rows = corpus::rows(&folder.join("labels.jsonl"))?;
    let mut above: BTreeMap<String, String> = BTreeMap::new();
    for row in &rows {
        let own = top(&mut above, row["message_id"].as_str().unwrap_or_default());
        let references = row["references"].as_array().into_iter().flatten();
        for other in references.chain([&row["in_reply_to"]]).filter_map(Value::as_str) {
            let other = top(&mut above, other);
            let own = top(&mut above, &own);
            above.insert(other, own);
        }
    }
    let mut mails = rows
        .iter()
        .map(|row| {
            let mail = labelled(folder, row)?;
            let thread = top(&mut above, row["message_id"].as_str().unwrap_or_default());
            Ok(Threaded { mail, thread })
        })
        .collect::<Result<Vec<_>, String>>()?;
    mails.sort_by(|a, b| (a.mail.time, &a.mail.name).cmp(&(b.mail.time, &b.mail.name)));
    Ok(mails)
}

fn labelled(folder: &Path, row: &Value) -> Result<Labelled, String> {
    let file = row["file"].as_str().ok_or("a label without a file")?;
    let label = row["team"].as_str().unwrap_or_default().to_owned();
    Ok(Labelled::new(file.to_owned(), label, corpus::read(&folder.join(file))?))
}

/// The name of the set of ids that this one belongs to.
fn top(above: &mut BTreeMap<String, String>, id: &str) -> String {
    let mut id = id.to_owned();
    while let Some(next) = above.get(&id).filter(|next| **next != id) {
        id = next.clone();
    }
    above.entry(id.clone()).or_insert_with(|| id.clone());
    id
}

/// The rows that are printed.
#[derive(Default)]
struct Table {
    rows: Vec<[String; 4]>,
}

impl Table {
    fn row(&mut self, task: &str, figure: String, reference: &str, target: &str) {
        eprintln!("    {task}: {figure}");
        self.rows.push([task.to_owned(), figure, reference.to_owned(), target.to_owned()]);
    }

    fn text(&self) -> String {
        let head = ["task", "measured", "reference", "to reach"].map(str::to_owned);
        let all = || [&head].into_iter().chain(&self.rows);
        let widths: Vec<usize> =
            (0..4).map(|column| all().map(|row| row[column].chars().count()).max().unwrap_or(0)).collect();
        let mut text = String::new();
        for (number, row) in all().enumerate() {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
            text += &format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "));
            if number == 0 {
                let lines = widths.iter().map(|width| "-".repeat(*width));
                text += &format!("|-{}-|\n", lines.collect::<Vec<_>>().join("-|-"));
            }
        }
        text
    }

    /// Mails one after the other, with memory: which are found to belong to an issue, and is it the right one?
    fn issues(&mut self, task: &str, mails: &[Threaded], reference: &str, target: &str) -> Result<(), String> {
        let rules = Rules::defaults();
        let mut memory = Map::default();
        let mut opened: BTreeMap<String, &str> = BTreeMap::new();
        let mut known: BTreeSet<&str> = BTreeSet::new();
        let (mut joined, mut right, mut follow_ups, mut all) = (0, 0, 0, 0);
        for Threaded { mail, thread } in mails {
            let Ok(verdict) = triage_with(&mail.data, mail.time, &rules, &mut memory) else { continue };
            all += 1;
            match &verdict.issue {
                Issue::Existing(id) => {
                    joined += 1;
                    right += usize::from(opened.get(id) == Some(&thread.as_str()));
                }
                Issue::New(id) => {
                    opened.insert(id.clone(), thread);
                }
            }
            follow_ups += usize::from(!known.insert(thread));
        }
        let (precision, recall) = (share(right, joined), share(right, follow_ups));
        let f1 = 2.0 * precision * recall / (precision + recall).max(f32::MIN_POSITIVE);
        let calls = memory.calls as f32 / all.max(1) as f32;
        let figure = format!("P {precision:.3} R {recall:.3} F1 {f1:.3} ({follow_ups} of {all}, {calls:.1} calls)");
        self.row(task, figure, reference, target);
        Ok(())
    }

    /// The oldest four fifths of each team's mail to learn from, the rest to test with.
    fn teams(&mut self, mails: &[Threaded]) -> Result<(), String> {
        let own: Vec<Labelled> = mails.iter().map(|mail| without_list_sender(&mail.mail)).collect();
        let labels = labels_of(&own);
        let (learned_from, test) = corpus::split(own.clone(), 80);
        let examples: Vec<(&[u8], usize)> =
            learned_from.iter().map(|mail| (&mail.data[..], number_of(&labels, &mail.label))).collect();
        let learned = learn(&examples, &labels, false)?;
        let file: &'static [u8] = learned.model.leak();
        let model = Model::read(file)?;
        let alone = score(&model, &labels, &test);
        let majority = share(test.iter().filter(|mail| mail.label == labels[0]).count(), test.len());
        let (sure, sure_right) = sure(&model, &test);
        self.row(
            &format!("team by the mail alone, {} labels", labels.len()),
            format!("accuracy {:.3}, macro-F1 {:.3}", alone.accuracy(), alone.macro_f1()),
            &format!("0.912; majority {majority:.3}"),
            "",
        );
        self.row(
            "team by the mail alone, where sure",
            format!("accuracy {:.3} on {:.3} of the mails", share(sure_right, sure), share(sure, test.len())),
            "",
            "",
        );

        // As in service: everything in order of time, with memory. What was learned from stands for what people sorted.
        let tested: BTreeSet<&str> = test.iter().map(|mail| mail.name.as_str()).collect();
        for (task, confidence) in
            [("team, with what else the issue's mails say", None), ("the same, team.confidence=0.5", Some("0.5"))]
        {
            let rules = Rules::from_config(confidence.map(|confidence| ("team.confidence", confidence)))?;
            let rules = rules.with_team_model(file)?;
            let mut memory = Map::default();
            let mut filed: BTreeMap<String, &str> = BTreeMap::new();
            let (mut right, mut right_once, mut twice, mut unsure) = (0, 0, 0, 0);
            for mail in &own {
                let Ok(verdict) = triage_with(&mail.data, mail.time, &rules, &mut memory) else { continue };
                // The same mail, sent to two teams, is in the data twice, but has one verdict.
                let id =
                    Mail::read(&mail.data).map(|mail| String::from_utf8_lossy(mail.fields.message_id).into_owned());
                let first = *filed.entry(id.unwrap_or_default()).or_insert(&mail.label);
                if tested.contains(mail.name.as_str()) {
                    let is_right = verdict.queue == mail.label;
                    right += usize::from(is_right);
                    unsure += usize::from(verdict.queue == rules.queue_name(None));
                    if first == mail.label {
                        right_once += usize::from(is_right);
                    } else {
                        twice += 1;
                    }
                }
            }
            let (all, once) = (share(right, test.len()), share(right_once, test.len() - twice));
            let unsure = share(unsure, test.len());
            let (reference, target) = if confidence.is_none() { ("0.912", "accuracy ≥ 0.93") } else { ("", "") };
            let figure = format!(
                "accuracy {once:.3}, default queue {unsure:.3}; {all:.3} with {twice} mails that another team has too"
            );
            self.row(task, figure, reference, target);
        }
        eprintln!("{}", alone.table(&labels));
        Ok(())
    }

    /// New reports of the bug tracker, without the lines that state the answer.
    fn severity(&mut self, folder: &Path) -> Result<(), String> {
        let mut mails = Vec::new();
        for row in corpus::rows(&folder.join("labels.jsonl"))? {
            let severity = row["severity"].as_str().unwrap_or_default();
            let label = match severity {
                "normal" => "normal",
                "high" | "blocking" => "high",
                _ => continue,
            };
            if row["kind"] == "new" {
                let mail = labelled(folder, &row)?;
                mails.push(Labelled { label: label.to_owned(), data: without_answer(&mail.data), ..mail });
            }
        }
        let labels = labels_of(&mails);
        let (learned_from, test) = corpus::split(mails, 67);
        let examples: Vec<(&[u8], usize)> =
            learned_from.iter().map(|mail| (&mail.data[..], number_of(&labels, &mail.label))).collect();
        let learned = learn(&examples, &labels, true)?;
        let score = score(&Model::read(&learned.model)?, &labels, &test);
        let validated = learned.validated.macro_f1();
        self.row(
            "severity high or normal, new reports",
            format!("macro-F1 {:.3} ({} mails; cross-validated {validated:.3})", score.macro_f1(), test.len()),
            "0.492",
            "macro-F1 ≥ 0.60",
        );
        eprintln!("{}", score.table(&labels));
        Ok(())
    }

    /// Every fifth mail of each folder to test with, the rest to learn from: the dates of spam are not to be trusted.
    fn spam(&mut self, folder: &Path) -> Result<(), String> {
        let labels = ["ham".to_owned(), "spam".to_owned()];
        let (mut learned_from, mut test) = (Vec::new(), Vec::new());
        for (folder, label) in
            [("easy-ham-1", &labels[0]), ("spam-1", &labels[1])].map(|(name, label)| (folder.join(name), label))
        {
            let entries = fs::read_dir(&folder).map_err(|error| format!("read {}: {error}", folder.display()))?;
            let mut files = entries
                .map(|entry| entry.map(|entry| entry.path()))
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| format!("read {}: {error}", folder.display()))?;
            files.sort();
            for (number, file) in files.iter().enumerate() {
                let mail = Labelled::new(file.display().to_string(), label.clone(), corpus::read(file)?);
                if number % 5 == 4 { test.push(mail) } else { learned_from.push(mail) }
            }
        }
        let examples: Vec<(&[u8], usize)> =
            learned_from.iter().map(|mail| (&mail.data[..], number_of(&labels, &mail.label))).collect();
        let learned = learn(&examples, &labels, false)?;
        let score = score(&Model::read(&learned.model)?, &labels, &test);
        self.row(
            "spam or ham, as two queues",
            format!("accuracy {:.3}, macro-F1 {:.3} ({} mails)", score.accuracy(), score.macro_f1(), test.len()),
            "",
            "accuracy ≥ 0.98",
        );
        Ok(())
    }
}

fn labels_of(mails: &[Labelled]) -> Vec<String> {
    let labels: BTreeSet<&String> = mails.iter().map(|mail| &mail.label).collect();
    labels.into_iter().cloned().collect()
}

fn number_of(labels: &[String], label: &str) -> usize {
    labels.iter().position(|known| known == label).unwrap_or(0)
}

fn score(model: &Model<'_>, labels: &[String], test: &[Labelled]) -> Score {
    let guess = |mail: &Labelled| {
        let guess = Mail::read(&mail.data).map(|mail| model.guess(&mail));
        guess.map_or(0, |guess| number_of(labels, guess.label))
    };
    let guesses: Vec<usize> = test.iter().map(guess).collect();
    let truth: Vec<usize> = test.iter().map(|mail| number_of(labels, &mail.label)).collect();
    Score::of(&guesses, &truth, labels.len())
}

/// Of how many mails the model is sure, and of how many of these it is right.
fn sure(model: &Model<'_>, test: &[Labelled]) -> (usize, usize) {
    let mut sure = (0, 0);
    for mail in test {
        let Ok(read) = Mail::read(&mail.data) else { continue };
        let guess = model.guess(&read);
        if guess.confidence >= model.threshold() {
            sure.0 += 1;
            sure.1 += usize::from(guess.label == mail.label);
        }
    }
    sure
}

/// The mail without its From field where a list put its own address there: a support mailbox has no such hint.
fn without_list_sender(mail: &Labelled) -> Labelled {
    let is_lists = Mail::read(&mail.data).is_ok_and(|read| {
        let sender = read.sender().map(<[u8]>::to_ascii_lowercase);
        read.header("List-Post").chain(read.header("List-Id")).any(|list| {
            let list = list.to_ascii_lowercase();
            let address = sender.as_deref().unwrap_or_default();
            let local = address.split(|&byte| byte == b'@').next().unwrap_or_default();
            !local.is_empty() && (contains(&list, address) || contains(&list, &[local, b"."].concat()))
        })
    });
    if !is_lists {
        return mail.clone();
    }
    let mut kept = Vec::new();
    let (mut in_header, mut drops) = (true, false);
    for line in mail.data.split_inclusive(|&byte| byte == b'\n') {
        in_header = in_header && !line.trim_ascii().is_empty();
        if !matches!(line.first(), Some(b' ' | b'\t')) {
            drops = line.get(..5).is_some_and(|name| name.eq_ignore_ascii_case(b"from:"));
        }
        if !(in_header && drops) {
            kept.extend_from_slice(line);
        }
    }
    Labelled { data: kept, ..mail.clone() }
}

fn contains(text: &[u8], piece: &[u8]) -> bool {
    text.windows(piece.len().max(1)).any(|window| window == piece)
}

/// The report without the lines in which the tracker repeats what the reporter chose as severity and priority.
fn without_answer(data: &[u8]) -> Vec<u8> {
    let states = |line: &&[u8]| {
        let line = line.trim_ascii().to_ascii_lowercase();
        ["severity:", "priority:", "x-bugzilla-severity:", "x-bugzilla-priority:"]
            .iter()
            .any(|name| line.starts_with(name.as_bytes()))
    };
    data.split_inclusive(|&byte| byte == b'\n').filter(|line| !states(line)).collect::<Vec<_>>().concat()
}

/// Runs the component on some of the mails, and says whether it decides as the library does.
fn agreement(teams: &[Threaded], bugs: &[Threaded], host: &Path, component: &Path) -> Result<String, String> {
    let folder = std::env::temp_dir().join(format!("mailroom-quality-sample-{}", std::process::id()));
    let _ends = Temporary::new(&folder)?;
    let all: Vec<&Threaded> = teams.iter().chain(bugs).collect();
    let sample: Vec<&Threaded> = all.iter().step_by((all.len() / SAMPLE).max(1)).copied().collect();
    let mut files = Vec::new();
    for (number, mail) in sample.iter().enumerate() {
        let file = folder.join(format!("{number:05}.eml"));
        fs::write(&file, &mail.mail.data).map_err(|error| format!("write {}: {error}", file.display()))?;
        files.push(file);
    }
    let mut command = Command::new(host);
    command.arg("triage").arg("--json").arg(component).args(&files).stderr(Stdio::inherit());
    let output = command.output().map_err(|error| format!("run {}: {error}", host.display()))?;
    let verdicts: Vec<Value> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).map_err(|error| format!("{line}: {error}")))
        .collect::<Result<_, _>>()?;
    let rules = Rules::defaults();
    let mut same = 0;
    for (mail, verdict) in sample.iter().zip(&verdicts) {
        let ours = triage(&mail.mail.data, &rules)?;
        let is_same = verdict["priority"] == ours.priority.as_str()
            && verdict["issue"]["id"] == ours.issue.id()
            && verdict["issue"]["kind"] == ours.issue.kind()
            && verdict["queue"] == ours.queue.as_str();
        same += usize::from(is_same);
    }
    Ok(format!("The component, run by the host, decides {same} of {} mails as the library does.", sample.len()))
}

/// A folder that goes when it is done with.
struct Temporary<'a>(&'a Path);

impl<'a> Temporary<'a> {
    fn new(folder: &'a Path) -> Result<Temporary<'a>, String> {
        fs::create_dir_all(folder).map_err(|error| format!("create {}: {error}", folder.display()))?;
        Ok(Temporary(folder))
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        // It lies in the system's folder for what may go; nobody can be told anyhow.
        let _ = fs::remove_dir_all(self.0);
    }
}

/// Archives, unpacked into a folder that goes when it is done with.
struct Unpacked {
    path: PathBuf,
}

impl Unpacked {
    fn new(data: &Path, names: &[&str]) -> Result<Unpacked, String> {
        let path = std::env::temp_dir().join(format!("mailroom-quality-{}", std::process::id()));
        fs::create_dir_all(&path).map_err(|error| format!("create {}: {error}", path.display()))?;
        let unpacked = Unpacked { path };
        for name in names {
            let archive = data.join(format!("{name}.tar.xz"));
            let status = Command::new("tar").arg("-xJf").arg(&archive).arg("-C").arg(&unpacked.path).status();
            let status = status.map_err(|error| format!("run tar: {error}; apt-get install tar xz-utils"))?;
            if !status.success() {
                return Err(format!("tar cannot unpack {}; it takes xz: apt-get install xz-utils", archive.display()));
            }
        }
        Ok(unpacked)
    }
}

impl Drop for Unpacked {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}
