//! Mails and their labels, from files.

use guest::mail::Mail;
use serde_json::Value;
use std::fs;
use std::path::Path;

/// A mail with its label.
#[derive(Clone, Debug)]
pub struct Labelled {
    /// Where it is from, for people.
    pub name: String,
    /// Who took it.
    pub label: String,
    /// The mail, as a mail server would deliver it.
    pub data: Vec<u8>,
    /// When it was written, in seconds since 1970; 0 if it does not say.
    pub time: u64,
}

impl Labelled {
    /// A mail, its time read from its Date field.
    pub fn new(name: String, label: String, data: Vec<u8>) -> Labelled {
        let time = Mail::read(&data).ok().and_then(|mail| mail.time()).unwrap_or(0);
        Labelled { name, label, data, time }
    }
}

/// Reads JSON lines with the members `file`, a path beside the list, and `label`.
///
/// # Errors
/// What cannot be read, with its place.
pub fn json_lines(list: &Path, label: &str) -> Result<Vec<Labelled>, String> {
    let folder = list.parent().unwrap_or(Path::new("."));
    rows(list)?
        .iter()
        .enumerate()
        .map(|(number, row)| {
            let text = |member: &str| {
                let text = row.get(member).and_then(Value::as_str);
                text.ok_or_else(|| format!("{}, line {}: no text {member:?}", list.display(), number + 1))
            };
            let (file, label) = (text("file")?, text(label)?);
            Ok(Labelled::new(file.to_owned(), label.to_owned(), read(&folder.join(file))?))
        })
        .collect()
}

/// Reads the objects of a file of JSON lines.
///
/// # Errors
/// What cannot be read, with its place.
pub fn rows(list: &Path) -> Result<Vec<Value>, String> {
    let text = String::from_utf8_lossy(&read(list)?).into_owned();
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| {
            serde_json::from_str(line).map_err(|error| format!("{}, line {}: {error}", list.display(), number + 1))
        })
        .collect()
}

/// Reads all mails of an mbox file, which all have this label.
///
/// # Errors
/// The file cannot be read.
pub fn mbox(file: &Path, label: &str) -> Result<Vec<Labelled>, String> {
    let data = read(file)?;
    let mut mails: Vec<Vec<u8>> = Vec::new();
    let mut after_empty = true;
    for line in data.split_inclusive(|&byte| byte == b'\n') {
        if after_empty && line.starts_with(b"From ") {
            mails.push(Vec::new());
        } else if let Some(mail) = mails.last_mut() {
            mail.extend_from_slice(line);
        } else {
            return Err(format!("{}: no mbox, it does not begin with `From `", file.display()));
        }
        after_empty = line.trim_ascii().is_empty();
    }
    let name = |number| format!("{}#{number}", file.display());
    Ok((1..).zip(mails).map(|(number, mail)| Labelled::new(name(number), label.to_owned(), mail)).collect())
}

/// Reads a file.
///
/// # Errors
/// The path and why it cannot be read.
pub fn read(file: &Path) -> Result<Vec<u8>, String> {
    fs::read(file).map_err(|error| format!("read {}: {error}", file.display()))
}

/// The oldest of each label to learn from, `percent` of them, and the rest to test with. Both are in order of time.
pub fn split(mut mails: Vec<Labelled>, percent: usize) -> (Vec<Labelled>, Vec<Labelled>) {
    mails.sort_by(|a, b| (a.time, &a.name).cmp(&(b.time, &b.name)));
    let mut labels: Vec<String> = mails.iter().map(|mail| mail.label.clone()).collect();
    labels.sort();
    labels.dedup();
    let count = |label: &String| mails.iter().filter(|mail| mail.label == *label).count();
    let mut left: Vec<(String, usize)> =
        labels.iter().map(|label| (label.clone(), count(label) * percent / 100)).collect();
    mails.into_iter().partition(|mail| {
        let left = left.iter_mut().find(|(label, _)| *label == mail.label);
        left.is_some_and(|(_, left)| {
            let learns = *left > 0;
            *left = left.saturating_sub(1);
            learns
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The oldest of each label are learned from, whatever their order in the file.
    #[test]
    fn the_newest_are_kept_for_the_test() {
        let mail = |label: &str, day: u32| {
            let data = format!("Date: Mon, {day} Mar 2026 10:00:00 +0000\n\n").into_bytes();
            Labelled::new(format!("{label}{day}"), label.to_owned(), data)
        };
        let mails = vec![mail("a", 9), mail("b", 2), mail("a", 1), mail("a", 4), mail("b", 1), mail("a", 3)];
        let (learn, test) = split(mails, 75);
        let names = |mails: &[Labelled]| mails.iter().map(|mail| mail.name.clone()).collect::<Vec<_>>();
        assert_eq!(
            (names(&learn), names(&test)),
            (vec!["a1".into(), "b1".into(), "a3".into(), "a4".into()], vec!["b2".into(), "a9".into()])
        );
    }
}
