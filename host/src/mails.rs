//! Mails on disk: single files, mbox files, Maildirs, folders of them, standard input.

use clap::ValueEnum;
use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// The largest mail that is read into memory: what a NATS server can be configured to take at most.
pub const MAIL_MAX_BYTES: usize = 64 * 1024 * 1024;

/// How files are to be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// Find out: a directory with cur/ and new/ is a Maildir; a file with several "From " lines, or named mbox or
    /// *.mbox, is an mbox; any other file is one mail
    #[default]
    Auto,
    /// One mail a file
    Mail,
    /// Many mails in one file, each after a line such as "From ann@example.com Thu Jan  1 00:00:00 1970"
    Mbox,
    /// A directory with cur/ and new/
    Maildir,
}

/// A mail, raw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mail {
    /// Where it came from: the file, with `#` and a number counted from 1 for a mail of an mbox.
    pub name: String,
    /// The mail, byte for byte as it was stored, without an mbox's quoting.
    pub data: Vec<u8>,
}

/// Why there is no mail where one was named.
#[derive(Debug, thiserror::Error)]
pub enum MailError {
    /// A file or directory that cannot be read, or is not what `--format` says.
    #[error("{name}: {source}")]
    Unreadable {
        /// The file, `standard input`, or the mail inside an mbox.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// More than [`MAIL_MAX_BYTES`]; the rest of it was skipped where there are more mails.
    #[error("{name}: larger than {} MiB, the most that NATS can take", MAIL_MAX_BYTES / 1024 / 1024)]
    TooLarge {
        /// The file, or the mail inside an mbox.
        name: String,
    },
}

impl MailError {
    /// What could not be read: the file, `standard input`, or the mail inside an mbox.
    pub fn name(&self) -> &str {
        match self {
            Self::Unreadable { name, .. } | Self::TooLarge { name } => name,
        }
    }
}

/// What reading a mail gives.
pub type Result<T, E = MailError> = std::result::Result<T, E>;

/// The mails in `paths`, in the order given; `-` is standard input.
///
/// A directory that is no Maildir gives the mails of its files and directories, sorted by name, hidden ones left
/// out. A Maildir's mails come sorted by file name, which is the order of delivery; `tmp/` is left out.
///
/// One mail at a time is in memory. An error does not end the iteration unless it is about the last path.
pub fn mails(paths: &[PathBuf], format: Format) -> impl Iterator<Item = Result<Mail>> + Send + use<> {
    let ahead = paths
        .iter()
        .map(|path| if path.as_os_str() == "-" { Source::Stdin } else { Source::Path(path.clone()) })
        .collect();
    Mails { format, ahead, mbox: None }
}

struct Mails {
    format: Format,
    ahead: VecDeque<Source>,
    mbox: Option<Mbox<Box<dyn BufRead + Send>>>,
}

enum Source {
    Stdin,
    Path(PathBuf),
    /// A file that is one mail whatever it looks like.
    Mail(PathBuf),
}

impl Iterator for Mails {
    type Item = Result<Mail>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(mbox) = &mut self.mbox {
                match mbox.next() {
                    Some(mail) => return Some(mail),
                    None => self.mbox = None,
                }
            }
            let opened = match self.ahead.pop_front()? {
                Source::Stdin => self.open_stdin(),
                Source::Mail(path) => read_file(&path).map(Some),
                Source::Path(path) => self.open(&path),
            };
            if let Some(mail) = opened.transpose() {
                return Some(mail);
            }
        }
    }
}

impl Mails {
    /// Gives the one mail that is in `path`, or queues the several that are.
    fn open(&mut self, path: &Path) -> Result<Option<Mail>> {
        let name = path.display().to_string();
        let unreadable = |source| MailError::Unreadable { name: name.clone(), source };
        let no_maildir = |why| unreadable(io::Error::new(io::ErrorKind::InvalidInput, why));
        if fs::metadata(path).map_err(unreadable)?.is_dir() {
            let is_maildir = path.join("cur").is_dir() && path.join("new").is_dir();
            let entries = match self.format {
                Format::Maildir if !is_maildir => return Err(no_maildir("no Maildir: it has no cur/ and new/")),
                Format::Auto | Format::Maildir if is_maildir => maildir(path),
                _ => directory(path),
            };
            for entry in entries.map_err(unreadable)?.into_iter().rev() {
                self.ahead.push_front(entry);
            }
            return Ok(None);
        }
        match self.format {
            Format::Maildir => Err(no_maildir("no Maildir: it is a file")),
            Format::Mail => read_file(path).map(Some),
            Format::Auto | Format::Mbox => {
                let file = File::open(path).map_err(unreadable)?;
                let sure = self.format == Format::Mbox || is_named_mbox(path);
                self.mbox = Some(Mbox::new(name, Box::new(BufReader::with_capacity(64 * 1024, file)), sure));
                Ok(None)
            }
        }
    }

    fn open_stdin(&mut self) -> Result<Option<Mail>> {
        let name = "standard input".to_owned();
        match self.format {
            Format::Mail => read_all(name, io::stdin().lock()).map(Some),
            Format::Maildir => {
                let source = io::Error::new(io::ErrorKind::InvalidInput, "a Maildir is a directory");
                Err(MailError::Unreadable { name, source })
            }
            Format::Auto | Format::Mbox => {
                let reader = Box::new(BufReader::with_capacity(64 * 1024, io::stdin()));
                self.mbox = Some(Mbox::new(name, reader, self.format == Format::Mbox));
                Ok(None)
            }
        }
    }
}

fn maildir(path: &Path) -> io::Result<Vec<Source>> {
    let mut files = Vec::new();
    for part in ["cur", "new"] {
        for entry in visible(&path.join(part))? {
            if entry.is_file() {
                files.push(entry);
            }
        }
    }
    files.sort_by(|a, b| a.file_name().cmp(&b.file_name()));
    Ok(files.into_iter().map(Source::Mail).collect())
}

fn directory(path: &Path) -> io::Result<Vec<Source>> {
    let mut entries = visible(path)?;
    // Links to directories could lead around in circles; fifos and sockets would block.
    entries.retain(|entry| entry.is_file() || (entry.is_dir() && !entry.is_symlink()));
    entries.sort();
    Ok(entries.into_iter().map(Source::Path).collect())
}

fn visible(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            entries.push(entry.path());
        }
    }
    Ok(entries)
}

fn is_named_mbox(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == "mbox") || path.extension().is_some_and(|ext| ext == "mbox")
}

fn read_file(path: &Path) -> Result<Mail> {
    let name = path.display().to_string();
    match File::open(path) {
        Ok(file) => read_all(name, file),
        Err(source) => Err(MailError::Unreadable { name, source }),
    }
}

fn read_all(name: String, reader: impl Read) -> Result<Mail> {
    let mut data = Vec::new();
    match reader.take(MAIL_MAX_BYTES as u64 + 1).read_to_end(&mut data) {
        Err(source) => Err(MailError::Unreadable { name, source }),
        Ok(_) if data.len() > MAIL_MAX_BYTES => Err(MailError::TooLarge { name }),
        Ok(_) => Ok(Mail { name, data }),
    }
}

/// The mails of an mbox, read line by line.
struct Mbox<R> {
    name: String,
    reader: R,
    /// Whether this is known to be an mbox. If not, it is one mail unless a second `From ` line turns up.
    sure: bool,
    /// Mails given or skipped so far.
    count: usize,
    /// The next mail's `From ` line has been read.
    at_mail: bool,
    done: bool,
}

impl<R: BufRead> Mbox<R> {
    fn new(name: String, reader: R, sure: bool) -> Self {
        Self { name, reader, sure, count: 0, at_mail: false, done: false }
    }

    fn next(&mut self) -> Option<Result<Mail>> {
        if self.done {
            return None;
        }
        let result = self.read();
        if matches!(result, Err(MailError::Unreadable { .. }) | Ok(None)) {
            self.done = true;
        }
        result.transpose()
    }

    fn read(&mut self) -> Result<Option<Mail>> {
        // The first line decides: without a `From ` line an unsure file is one mail, read without looking further.
        let mut raw = Vec::new();
        let mut line = Vec::new();
        if !self.at_mail {
            loop {
                line.clear();
                if self.line(&mut line)? == 0 {
                    // An empty mbox has no mail; an empty file is an empty mail.
                    self.done = true;
                    return Ok((!self.sure).then(|| Mail { name: self.name.clone(), data: Vec::new() }));
                }
                if is_separator(&line) {
                    break;
                }
                if !self.sure {
                    self.done = true;
                    let rest = io::Cursor::new(line).chain(&mut self.reader);
                    return read_all(self.name.clone(), rest).map(Some);
                }
                if !is_blank(&line) {
                    let source =
                        io::Error::new(io::ErrorKind::InvalidData, "no mbox: its first line is no `From ` line");
                    return Err(MailError::Unreadable { name: self.name.clone(), source });
                }
            }
            raw.extend_from_slice(&line);
            self.at_mail = true;
        }

        self.count += 1;
        let mut data = Vec::new();
        let mut too_large = false;
        let mut last_blank = 0;
        let mut after_blank = false;
        loop {
            line.clear();
            if self.line(&mut line)? == 0 {
                self.done = true;
                break;
            }
            if after_blank && is_separator(&line) {
                self.sure = true;
                break;
            }
            after_blank = is_blank(&line);
            last_blank = if after_blank { line.len() } else { 0 };
            too_large |= data.len() + line.len() > MAIL_MAX_BYTES;
            if too_large {
                // Read on, to find the next mail, but keep nothing.
                (data, raw) = (Vec::new(), Vec::new());
                continue;
            }
            if !self.sure {
                raw.extend_from_slice(&line);
            }
            data.extend_from_slice(unquoted(&line));
        }
        let name = if self.sure { format!("{}#{}", self.name, self.count) } else { self.name.clone() };
        if too_large {
            return Err(MailError::TooLarge { name });
        }
        if !self.sure {
            return Ok(Some(Mail { name, data: raw }));
        }
        // The blank line before the next `From ` line, or at the end, belongs to the mbox.
        data.truncate(data.len() - last_blank.min(data.len()));
        Ok(Some(Mail { name, data }))
    }

    /// Reads a line with its end; a line beyond all measure comes in pieces, so that it cannot fill the memory.
    fn line(&mut self, line: &mut Vec<u8>) -> Result<usize> {
        (&mut self.reader)
            .take(MAIL_MAX_BYTES as u64 + 1)
            .read_until(b'\n', line)
            .map_err(|source| MailError::Unreadable { name: self.name.clone(), source })
    }
}

fn is_blank(line: &[u8]) -> bool {
    matches!(line, b"\n" | b"\r\n")
}

/// Takes one level of the quoting away that keeps a mail's own `From ` lines apart from the mbox's (mboxrd).
fn unquoted(line: &[u8]) -> &[u8] {
    let quotes = line.iter().take_while(|&&byte| byte == b'>').count();
    if quotes > 0 && line[quotes..].starts_with(b"From ") { &line[1..] } else { line }
}

/// Whether this is a line `From <address> <date as asctime writes it>` (RFC 4155), with or without a time zone.
fn is_separator(line: &[u8]) -> bool {
    const DAYS: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let Some(rest) = line.strip_prefix(b"From ") else { return false };
    let Ok(rest) = str::from_utf8(rest) else { return false };
    let mut words = rest.split_ascii_whitespace();
    let Some(_address) = words.next() else { return false };
    let number = |word: &str, digits: std::ops::RangeInclusive<usize>| {
        digits.contains(&word.len()) && word.bytes().all(|byte| byte.is_ascii_digit())
    };
    words.next().is_some_and(|day| DAYS.contains(&day))
        && words.next().is_some_and(|month| MONTHS.contains(&month))
        && words.next().is_some_and(|day| number(day, 1..=2))
        && words.next().is_some_and(|time| {
            (2..=3).contains(&time.split(':').count()) && time.split(':').all(|part| number(part, 1..=2))
        })
        && words.take(3).any(|year| number(year, 4..=4))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: &str = "From ann@example.com Thu Jan  1 00:00:00 1970\n";

    fn read(text: &str, sure: bool) -> Vec<(String, String)> {
        let mut mbox = Mbox::new("box".into(), text.as_bytes(), sure);
        std::iter::from_fn(|| mbox.next())
            .map(|mail| mail.expect("readable"))
            .map(|mail| (mail.name, String::from_utf8(mail.data).expect("utf-8")))
            .collect()
    }

    #[test]
    fn separators_are_told_from_text() {
        let yes = [
            "From ann@example.com Thu Jan  1 00:00:00 1970\n",
            "From MAILER-DAEMON Fri Jul  8 12:08:34 2011\r\n",
            "From - Mon Jun 23 09:05 2025\n",
            "From a@b Sat Jan 03 01:05:34 +0100 1996",
            "From a@b Sat Jan  3 01:05:34 1996 -0500\n",
            "From a@b Sat Jan  3 01:05:34 MET DST 1996\n",
        ];
        for line in yes {
            assert!(is_separator(line.as_bytes()), "{line:?}");
        }
        let no = [
            "From here on, everything is different\n",
            "From a@b yesterday\n",
            "From: ann@example.com Thu Jan  1 00:00:00 1970\n",
            ">From a@b Thu Jan  1 00:00:00 1970\n",
            "From Thu Jan  1 00:00:00 1970\n",
            "From a@b Thu Jan  1 midnight 1970\n",
            "From a@b Thu Jan  1 00:00:00\n",
            "From \n",
            "",
        ];
        for line in no {
            assert!(!is_separator(line.as_bytes()), "{line:?}");
        }
    }

    #[test]
    fn mboxes_are_split() {
        let mail = |number: usize, text: &str| (format!("box#{number}"), text.to_owned());
        let whole = |text: &str| ("box".to_owned(), text.to_owned());
        let crlf = FROM.replace('\n', "\r\n");
        // (text, known to be an mbox, mails)
        let cases = [
            // Two mails, and the mbox's own blank lines are not part of them.
            (
                format!("{FROM}A: 1\n\none\n\n{FROM}A: 2\n\ntwo\n\n"),
                false,
                vec![mail(1, "A: 1\n\none\n"), mail(2, "A: 2\n\ntwo\n")],
            ),
            (
                format!("{crlf}A: 1\r\n\r\none\r\n\r\n{crlf}A: 2\r\n\r\ntwo\r\n"),
                false,
                vec![mail(1, "A: 1\r\n\r\none\r\n"), mail(2, "A: 2\r\n\r\ntwo\r\n")],
            ),
            // No newline at the end.
            (
                format!("{FROM}A: 1\n\none\n\n{FROM}A: 2\n\ntwo"),
                false,
                vec![mail(1, "A: 1\n\none\n"), mail(2, "A: 2\n\ntwo")],
            ),
            // A `From ` line in the text splits only after a blank line and with a date.
            (
                format!("{FROM}A: 1\n\none\n{FROM}two\n\nFrom here on\n"),
                true,
                vec![mail(1, &format!("A: 1\n\none\n{FROM}two\n\nFrom here on\n"))],
            ),
            // One level of quoting goes.
            (
                format!("{FROM}A: 1\n\n>From me\n>>From you\n> From us\n"),
                true,
                vec![mail(1, "A: 1\n\n>From me\n>>From you\n> From us\n".replace(">From", "From").as_str())],
            ),
            // A single `From ` line, as MTAs put before a piped mail, proves nothing: the mail stays as it is.
            (format!("{FROM}A: 1\n\n>From me\n\n"), false, vec![whole(&format!("{FROM}A: 1\n\n>From me\n\n"))]),
            ("A: 1\n\none\n".into(), false, vec![whole("A: 1\n\none\n")]),
            (String::new(), false, vec![whole("")]),
            (String::new(), true, vec![]),
            ("\n\n".into(), true, vec![]),
            (FROM.into(), true, vec![mail(1, "")]),
            (format!("{FROM}\n{FROM}A: 2\n"), true, vec![mail(1, ""), mail(2, "A: 2\n")]),
        ];
        for (text, sure, expected) in cases {
            assert_eq!(read(&text, sure), expected, "{text:?}");
        }
    }

    #[test]
    fn what_is_no_mbox_is_refused_as_one() {
        let mut mbox = Mbox::new("box".into(), "A: 1\n\none\n".as_bytes(), true);
        let err = mbox.next().expect("an error").expect_err("no mbox").to_string();
        assert!(err.contains("box") && err.contains("From"), "{err}");
        assert!(mbox.next().is_none());
    }

    /// A mail beyond the limit is named and skipped; the ones around it are read.
    #[test]
    fn oversized_mail_does_not_hide_the_next() {
        let line = format!("{}\n", "x".repeat(1023));
        let large = line.repeat(MAIL_MAX_BYTES / 1024 + 1);
        let text = format!("{FROM}A: 1\n\n{FROM}{large}\n{FROM}A: 3\n");
        let mut mbox = Mbox::new("box".into(), text.as_bytes(), false);
        assert_eq!(mbox.next().expect("first").expect("fits").data, b"A: 1\n");
        let err = mbox.next().expect("second").expect_err("too large").to_string();
        assert!(err.contains("box#2"), "{err}");
        assert_eq!(mbox.next().expect("third").expect("fits").data, b"A: 3\n");
        assert!(mbox.next().is_none());
    }

    #[test]
    fn directories_and_maildirs_are_walked() {
        let root = tempfile::tempdir().expect("tempdir");
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
            fs::write(path, text).expect("write");
        };
        write("b.eml", "b");
        write("a.mbox", &format!("{FROM}1\n\n{FROM}2\n"));
        write(".hidden", "x");
        write("sub/c", "c");
        write("sub/.git/d", "x");
        write("inbox/new/2.host", "new");
        write("inbox/cur/1.host:2,S", &format!("{FROM}A: 1\n\n{FROM}"));
        write("inbox/tmp/3.host", "x");
        let names = |path: &Path, format| -> Vec<String> {
            let prefix = format!("{}/", root.path().display());
            mails(&[path.to_owned()], format)
                .map(|mail| match mail {
                    Ok(mail) => mail.name.replace(&prefix, ""),
                    Err(err) => err.to_string().replace(&prefix, ""),
                })
                .collect()
        };
        assert_eq!(
            names(root.path(), Format::Auto),
            ["a.mbox#1", "a.mbox#2", "b.eml", "inbox/cur/1.host:2,S", "inbox/new/2.host", "sub/c"]
        );
        assert_eq!(names(&root.path().join("a.mbox"), Format::Mail), ["a.mbox"]);
        assert_eq!(names(&root.path().join("inbox"), Format::Maildir).len(), 2);
        assert_eq!(names(&root.path().join("sub"), Format::Maildir), ["sub: no Maildir: it has no cur/ and new/"]);
        assert_eq!(names(&root.path().join("b.eml"), Format::Maildir), ["b.eml: no Maildir: it is a file"]);
        let missing = names(&root.path().join("nothing"), Format::Auto);
        assert!(missing[0].starts_with("nothing: "), "{missing:?}");
    }
}

#[cfg(test)]
mod fuzz {
    use super::*;
    use ::fuzz::{Strategy, any, check, collection, mutated, prop_oneof, sample};

    const FROM: &str = "From ann@example.com Thu Jan  1 00:00:00 1970\n";

    /// Mails that end in a newline, as all in an mbox do, with lines that look like the mbox's own.
    fn mail() -> impl Strategy<Value = Vec<u8>> {
        let line = prop_oneof![
            sample::select(vec!["", "From here", ">From there", ">>From", "A: b", "\r", FROM.trim_end()])
                .prop_map(|line| line.as_bytes().to_vec()),
            collection::vec(any::<u8>(), 0..30),
        ];
        collection::vec(line, 0..12).prop_map(|lines| [lines.join(&b'\n'), b"\n".to_vec()].concat())
    }

    /// An mbox of these mails, as mboxrd has it.
    fn mbox(mails: &[Vec<u8>]) -> Vec<u8> {
        let mut mbox = Vec::new();
        for mail in mails {
            mbox.extend_from_slice(FROM.as_bytes());
            for line in mail.split_inclusive(|byte| *byte == b'\n') {
                let quotes = line.iter().take_while(|byte| **byte == b'>').count();
                if line[quotes..].starts_with(b"From ") {
                    mbox.push(b'>');
                }
                mbox.extend_from_slice(line);
            }
            mbox.push(b'\n');
        }
        mbox
    }

    fn read(bytes: &[u8], sure: bool) -> Vec<Result<Mail>> {
        let mut mbox = Mbox::new("box".into(), bytes, sure);
        std::iter::from_fn(|| mbox.next()).take(1_000).collect()
    }

    /// Mails that were put into an mbox come out of it byte for byte, whatever they are.
    #[test]
    fn an_mbox_gives_back_what_was_put_in() {
        check("mails through an mbox", 4_000, collection::vec(mail(), 1..6), |mails| {
            let found = read(&mbox(&mails), true).into_iter().map(|mail| mail.expect("a mail").data);
            assert_eq!(found.collect::<Vec<_>>(), mails);
        });
    }

    /// Whatever a file holds, reading it ends, and gives no byte that is not in it.
    #[test]
    fn any_file_can_be_read_as_an_mbox() {
        let changed = collection::vec(mail(), 0..4).prop_flat_map(|mails| mutated(mbox(&mails)));
        let bytes = prop_oneof![collection::vec(any::<u8>(), 0..300), changed];
        check("an mbox of anything", 4_000, (bytes, any::<bool>()), |(bytes, sure)| {
            let found = read(&bytes, sure);
            assert!(found.len() < 1_000, "it does not end");
            let data: usize = found.iter().flatten().map(|mail| mail.data.len()).sum();
            assert!(data <= bytes.len());
            if !sure && found.len() == 1 {
                assert_eq!(found[0].as_ref().expect("a mail").data, bytes, "one mail is the whole file");
            }
        });
    }

    /// A Maildir's files are mails as they stand, whatever their bytes look like.
    #[test]
    fn a_maildir_gives_back_its_files() {
        let files = collection::btree_map("[a-z0-9:,=]{1,20}", collection::vec(any::<u8>(), 0..200), 0..6);
        check("mails of a Maildir", 60, files, |files| {
            let folder = tempfile::tempdir().expect("a folder");
            for part in ["cur", "new", "tmp"] {
                fs::create_dir(folder.path().join(part)).expect("a folder");
            }
            for (at, (name, data)) in files.iter().enumerate() {
                fs::write(folder.path().join(["cur", "new"][at % 2]).join(name), data).expect("written");
            }
            let found = mails(&[folder.path().to_owned()], Format::Auto).map(|mail| mail.expect("a mail").data);
            assert!(found.eq(files.into_values()));
        });
    }
}
