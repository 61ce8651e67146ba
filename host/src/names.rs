//! What the streams, the consumer and the subjects are called.

use anyhow::{Result, ensure};

/// The longest stream or consumer name the server takes.
const NAME_MAX_BYTES: usize = 255;

/// The names, as typed.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Names")]
pub struct NameArgs {
    /// Stream that the messages come from
    #[arg(long, value_name = "NAME", env = "MAILROOM_STREAM", default_value = "MAIL")]
    pub stream: String,

    /// Durable pull consumer on --stream; hosts that share it share the work
    #[arg(long, value_name = "NAME", env = "MAILROOM_CONSUMER", default_value = "triage")]
    pub consumer: String,

    /// Stream that keeps the verdicts
    #[arg(long, value_name = "NAME", env = "MAILROOM_VERDICT_STREAM", default_value = "VERDICTS")]
    pub verdict_stream: String,

    /// First part of the verdicts' subjects: SUBJECT.<queue>.<id>
    #[arg(long, value_name = "SUBJECT", env = "MAILROOM_VERDICT_SUBJECT", default_value = "verdict")]
    pub verdict_subject: String,

    /// Stream that keeps the dead letters: messages that got no verdict, with the reason
    #[arg(long, value_name = "NAME", env = "MAILROOM_DEAD_STREAM", default_value = "DEAD")]
    pub dead_stream: String,

    /// First part of the dead letters' subjects: SUBJECT.<stream>.<consumer>.<message id>
    #[arg(long, value_name = "SUBJECT", env = "MAILROOM_DEAD_SUBJECT", default_value = "dead")]
    pub dead_subject: String,

    /// First part of the subjects on which dead letters are run again: SUBJECT.<stream>.<consumer>.<their subject>
    #[arg(long, value_name = "SUBJECT", env = "MAILROOM_REPLAY_SUBJECT", default_value = "replay")]
    pub replay_subject: String,

    /// Stream in which retries wait that are due late
    #[arg(long, value_name = "NAME", env = "MAILROOM_PARKED_STREAM", default_value = "PARKED")]
    pub parked_stream: String,

    /// First part of the subjects of that stream
    #[arg(long, value_name = "SUBJECT", env = "MAILROOM_PARKED_SUBJECT", default_value = "parked")]
    pub parked_subject: String,
}

impl NameArgs {
    /// Checks the names against NATS' rules and against each other.
    ///
    /// # Errors
    /// A name or subject that NATS does not take, two streams of the same name, subjects that overlap.
    pub fn resolve(self) -> Result<Names> {
        check_name("--stream", &self.stream)?;
        check_name("--consumer", &self.consumer)?;
        check_name("--verdict-stream", &self.verdict_stream)?;
        check_name("--dead-stream", &self.dead_stream)?;
        check_subject("--verdict-subject", &self.verdict_subject)?;
        check_subject("--dead-subject", &self.dead_subject)?;
        check_subject("--replay-subject", &self.replay_subject)?;
        check_name("--parked-stream", &self.parked_stream)?;
        check_subject("--parked-subject", &self.parked_subject)?;
        let streams = [
            ("--stream", &self.stream),
            ("--verdict-stream", &self.verdict_stream),
            ("--dead-stream", &self.dead_stream),
            ("--parked-stream", &self.parked_stream),
        ];
        for ((flag, one), (other_flag, other)) in pairs(&streams) {
            ensure!(one != other, "{flag} and {other_flag} are both {one}; they must be different streams");
        }
        let names = Names {
            stream: self.stream,
            consumer: self.consumer,
            verdict_stream: self.verdict_stream,
            dead_stream: self.dead_stream,
            verdict_prefix: self.verdict_subject,
            dead_prefix: self.dead_subject,
            replay_prefix: self.replay_subject,
            parked_stream: self.parked_stream,
            parked_prefix: self.parked_subject,
        };
        let verdicts = ("--verdict-subject", &names.verdict_prefix, names.verdict_wildcard());
        let dead = ("--dead-subject", &names.dead_prefix, names.dead_wildcard());
        let replays = ("--replay-subject", &names.replay_prefix, names.replay_wildcard());
        let parked = ("--parked-subject", &names.parked_prefix, names.parked_wildcard());
        for (one, other) in pairs(&[verdicts, dead, replays, parked]) {
            ensure!(
                !overlap(&one.2, &other.2),
                "{} {} and {} {} overlap; a subject can be in one stream only",
                one.0,
                one.1,
                other.0,
                other.1
            );
        }
        Ok(names)
    }
}

/// The names, as meant: each is valid in NATS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// The stream that the messages come from.
    pub stream: String,
    /// The durable consumer on it.
    pub consumer: String,
    /// The stream of the verdicts.
    pub verdict_stream: String,
    /// The stream of the dead letters.
    pub dead_stream: String,
    verdict_prefix: String,
    dead_prefix: String,
    replay_prefix: String,
    /// The stream in which retries wait that are due late.
    pub parked_stream: String,
    parked_prefix: String,
}

impl Default for Names {
    fn default() -> Self {
        Self {
            stream: "MAIL".into(),
            consumer: "triage".into(),
            verdict_stream: "VERDICTS".into(),
            dead_stream: "DEAD".into(),
            verdict_prefix: "verdict".into(),
            dead_prefix: "dead".into(),
            replay_prefix: "replay".into(),
            parked_stream: "PARKED".into(),
            parked_prefix: "parked".into(),
        }
    }
}

impl Names {
    /// Where the verdict on message `id` for `queue` is published; both must be single tokens.
    pub fn verdict_subject(&self, queue: &str, id: &str) -> String {
        format!("{}.{queue}.{id}", self.verdict_prefix)
    }

    /// All verdicts.
    pub fn verdict_wildcard(&self) -> String {
        format!("{}.>", self.verdict_prefix)
    }

    /// The verdict on message `id`, whatever its queue.
    pub fn verdict_of(&self, id: &str) -> String {
        format!("{}.*.{id}", self.verdict_prefix)
    }

    /// All verdicts for `queue`.
    pub fn verdicts_for(&self, queue: &str) -> String {
        format!("{}.{queue}.*", self.verdict_prefix)
    }

    /// Where this consumer's dead letter of that name is published, see [`Origin::letter`](crate::letter::Origin::letter).
    pub fn dead_subject(&self, letter: &str) -> String {
        format!("{}.{}.{}.{letter}", self.dead_prefix, self.stream, self.consumer)
    }

    /// All of this consumer's dead letters.
    pub fn dead_of_consumer(&self) -> String {
        self.dead_subject(">")
    }

    /// All dead letters.
    pub fn dead_wildcard(&self) -> String {
        format!("{}.>", self.dead_prefix)
    }

    /// Where a message of `subject` is published that this consumer shall run again.
    pub fn replay_subject(&self, subject: &str) -> String {
        format!("{}.{}.{}.{subject}", self.replay_prefix, self.stream, self.consumer)
    }

    /// Every message that a consumer of the stream shall run again; the stream takes them, and nobody but operators
    /// may publish them.
    pub fn replay_wildcard(&self) -> String {
        format!("{}.{}.>", self.replay_prefix, self.stream)
    }

    /// Everything in the stream of parked retries.
    pub fn parked_wildcard(&self) -> String {
        format!("{}.>", self.parked_prefix)
    }

    /// Where a retry of message `id` waits for the server to publish it, `count` deliveries having failed. The count
    /// makes it another subject each time: what waits on it is never an earlier retry.
    pub fn scheduled_subject(&self, id: &str, count: u64) -> String {
        format!("{}.scheduled.{}.{}.{id}.{count}", self.parked_prefix, self.stream, self.consumer)
    }

    /// Where it waits for a host to publish it, on servers that schedule nothing.
    pub fn held_subject(&self, id: &str, count: u64) -> String {
        format!("{}.held.{}.{}.{id}.{count}", self.parked_prefix, self.stream, self.consumer)
    }

    /// Everything that waits for a host.
    pub fn held_wildcard(&self) -> String {
        format!("{}.held.>", self.parked_prefix)
    }

    /// Where the server publishes a retry of a message of `subject` that is due, for the stream to take it from there.
    pub fn due_subject(&self, subject: &str) -> String {
        format!("{}.due.{}.{}.{subject}", self.parked_prefix, self.stream, self.consumer)
    }

    /// All that is due for consumers of the stream.
    pub fn due_wildcard(&self) -> String {
        format!("{}.due.{}.>", self.parked_prefix, self.stream)
    }

    /// The consumer that shall run a message again and the message's own subject, if `subject` is one of
    /// [`Names::replay_wildcard`]. The message's own is empty where nothing follows the consumer.
    pub fn replayed<'a>(&self, subject: &'a str) -> Option<(&'a str, &'a str)> {
        let rest = subject.strip_prefix(&self.replay_prefix)?.strip_prefix('.')?;
        let rest = rest.strip_prefix(&self.stream)?.strip_prefix('.')?;
        Some(rest.split_once('.').unwrap_or((rest, "")))
    }
}

/// Every two of `all`.
fn pairs<T>(all: &[T]) -> impl Iterator<Item = (&T, &T)> {
    all.iter().enumerate().flat_map(|(place, one)| all[place + 1..].iter().map(move |other| (one, other)))
}

/// Checks a stream, consumer or domain name: one token, no wildcard, no path separator.
pub(crate) fn check_name(flag: &str, name: &str) -> Result<()> {
    ensure!(!name.is_empty(), "{flag} is empty");
    ensure!(name.len() <= NAME_MAX_BYTES, "{flag} is {} bytes long; at most {NAME_MAX_BYTES}", name.len());
    if let Some(bad) = name.chars().find(|&c| c.is_whitespace() || c.is_control() || ".*>/\\".contains(c)) {
        anyhow::bail!("{flag} {name:?}: a name must not contain {bad:?}");
    }
    Ok(())
}

/// Checks the name of a key-value bucket.
pub(crate) fn check_bucket(flag: &str, name: &str) -> Result<()> {
    check_name(flag, name)?;
    ensure!(
        name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)),
        "{flag} {name:?}: only letters, digits, - and _ are allowed"
    );
    Ok(())
}

/// Checks a subject to publish to: tokens separated by dots, no wildcard.
pub(crate) fn check_subject(flag: &str, subject: &str) -> Result<()> {
    check_pattern(flag, subject)?;
    ensure!(
        !subject.split('.').any(|token| token == "*" || token == ">"),
        "{flag} {subject:?}: a wildcard cannot be published to"
    );
    Ok(())
}

/// Checks a subject to listen on: as [`check_subject`], with `*` and a `>` at its end allowed.
pub(crate) fn check_pattern(flag: &str, subject: &str) -> Result<()> {
    ensure!(!subject.is_empty(), "{flag} is empty");
    if let Some(bad) = subject.chars().find(|&c| c.is_whitespace() || c.is_control()) {
        anyhow::bail!("{flag} {subject:?}: a subject must not contain {bad:?}");
    }
    let mut tokens = subject.split('.').peekable();
    while let Some(token) = tokens.next() {
        ensure!(!token.is_empty(), "{flag} {subject:?}: two dots in a row, or a dot at an end");
        ensure!(token != ">" || tokens.peek().is_none(), "{flag} {subject:?}: `>` is only allowed at the end");
    }
    Ok(())
}

/// Whether some subject matches both patterns.
pub(crate) fn overlap(one: &str, other: &str) -> bool {
    let (mut one, mut other) = (one.split('.'), other.split('.'));
    loop {
        match (one.next(), other.next()) {
            (None, None) | (Some(">"), Some(_)) | (Some(_), Some(">")) => return true,
            (Some(a), Some(b)) if a == b || a == "*" || b == "*" => {}
            _ => return false,
        }
    }
}

/// Whether every subject that matches `other` matches `pattern` too.
pub(crate) fn covers(pattern: &str, other: &str) -> bool {
    let (mut pattern, mut other) = (pattern.split('.'), other.split('.'));
    loop {
        match (pattern.next(), other.next()) {
            (None, None) | (Some(">"), Some(_)) => return true,
            (Some(a), Some(b)) if a == b || (a == "*" && b != ">") => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        names: NameArgs,
    }

    fn resolve(args: &[&str]) -> Result<Names> {
        let args = std::iter::once("test").chain(args.iter().copied());
        Command::try_parse_from(args)?.names.resolve()
    }

    #[test]
    fn flags_and_defaults_agree() {
        assert_eq!(resolve(&[]).expect("defaults"), Names::default());
    }

    #[test]
    fn subjects_follow_the_names() {
        let names = resolve(&["--verdict-subject", "acme.verdict", "--stream", "IN"]).expect("resolve");
        assert_eq!(names.verdict_subject("billing", "IN:1:t:5"), "acme.verdict.billing.IN:1:t:5");
        assert_eq!(names.verdict_wildcard(), "acme.verdict.>");
        assert_eq!(names.verdict_of("IN:1:t:5"), "acme.verdict.*.IN:1:t:5");
        assert_eq!(names.verdicts_for("billing"), "acme.verdict.billing.*");
        assert_eq!(names.dead_subject("IN:1:triage:5"), "dead.IN.triage.IN:1:triage:5");
        assert_eq!(names.dead_of_consumer(), "dead.IN.triage.>");
        assert_eq!(names.dead_wildcard(), "dead.>");
        assert_eq!(names.replay_wildcard(), "replay.IN.>");
        assert_eq!(names.replayed(&names.replay_subject("mail.a.b")), Some(("triage", "mail.a.b")));
        assert_eq!(names.replayed("replay.IN.triage"), Some(("triage", "")));
        assert_eq!(names.scheduled_subject("IN:1:triage:5", 2), "parked.scheduled.IN.triage.IN:1:triage:5.2");
        assert_eq!(names.held_subject("IN:1:triage:5", 2), "parked.held.IN.triage.IN:1:triage:5.2");
        assert_eq!(names.due_subject("mail.a"), "parked.due.IN.triage.mail.a");
        assert_eq!(names.due_wildcard(), "parked.due.IN.>");
        for subject in ["mail.a", "replay.MAIL.triage.a", "replay.INN.triage.a", "replay.IN", "replayIN.triage.a"] {
            assert_eq!(names.replayed(subject), None, "{subject}");
        }
    }

    #[test]
    fn names_that_nats_does_not_take_are_refused() {
        let cases: [(&[&str], &str); 13] = [
            (&["--stream", "a.b"], "'.'"),
            (&["--stream", ""], "--stream is empty"),
            (&["--consumer", "a b"], "' '"),
            (&["--consumer", "a/b"], "'/'"),
            (&["--dead-stream", "a*"], "'*'"),
            (&["--verdict-stream", "MAIL"], "--stream and --verdict-stream"),
            (&["--verdict-subject", "verdict.>"], "wildcard"),
            (&["--verdict-subject", ".verdict"], "two dots"),
            (&["--dead-subject", "a b"], "' '"),
            (&["--dead-subject", "verdict.dead"], "overlap"),
            (&["--replay-subject", "dead"], "overlap"),
            (&["--parked-stream", "DEAD"], "--dead-stream and --parked-stream"),
            (&["--parked-subject", "replay"], "overlap"),
        ];
        for (args, expected) in cases {
            let err = format!("{:#}", resolve(args).expect_err(expected));
            assert!(err.contains(expected), "{args:?}: {err}");
        }
    }

    #[test]
    fn overlapping_patterns_are_found() {
        let cases = [
            ("a", "a", true),
            ("a", "b", false),
            ("a.>", "a.b", true),
            ("a.>", "a", false),
            ("a.*", "a.b", true),
            ("a.*", "a.b.c", false),
            ("*.b", "a.*", true),
            (">", "a", true),
            ("a.>", "*.b.c", true),
        ];
        for (one, other, expected) in cases {
            assert_eq!(overlap(one, other), expected, "{one} {other}");
            assert_eq!(overlap(other, one), expected, "{other} {one}");
        }
    }

    #[test]
    fn covering_is_more_than_overlapping() {
        for (pattern, other, expected) in [
            (">", "a.>", true),
            ("a.>", "a.*.b", true),
            ("a.*", "a.b", true),
            ("a.*", "a.*", true),
            ("a.*", "a.>", false),
            ("a.b", "a.*", false),
            ("a.>", ">", false),
            ("a", "a.b", false),
            ("a.b", "a", false),
        ] {
            assert_eq!(covers(pattern, other), expected, "{pattern} {other}");
        }
    }

    #[test]
    fn patterns_may_end_in_a_full_wildcard() {
        assert!(check_pattern("--subjects", "mail.>").is_ok());
        assert!(check_pattern("--subjects", "mail.*.in").is_ok());
        assert!(check_pattern("--subjects", "mail.>.in").is_err());
        assert!(check_pattern("--subjects", "mail..in").is_err());
    }
}

#[cfg(test)]
mod fuzz {
    use super::*;
    use ::fuzz::{Strategy, check, collection, sample};

    /// All subjects of up to four tokens that are `a` or `b`.
    fn subjects() -> Vec<String> {
        let mut subjects = vec!["a".to_owned(), "b".to_owned()];
        let mut last = subjects.clone();
        for _ in 1..4 {
            last = last.iter().flat_map(|subject| ["a", "b"].map(|token| format!("{subject}.{token}"))).collect();
            subjects.extend(last.clone());
        }
        subjects
    }

    fn pattern() -> impl Strategy<Value = String> {
        let tokens = collection::vec(sample::select(vec!["a", "b", "*"]), 0..3);
        (tokens, sample::select(vec!["a", "b", "*", ">"])).prop_map(|(mut tokens, last)| {
            tokens.push(last);
            tokens.join(".")
        })
    }

    /// Patterns overlap if some subject matches both, and one covers the other if all do that match that.
    #[test]
    fn patterns_are_compared_by_what_they_match() {
        let subjects = subjects();
        check("comparing two patterns", 4_000, (pattern(), pattern()), |(one, other)| {
            check_pattern("--subject", &one).expect("a pattern");
            let both = |subject: &&String| covers(&one, subject) && covers(&other, subject);
            assert_eq!(overlap(&one, &other), subjects.iter().any(|subject| both(&subject)), "overlap");
            assert_eq!(overlap(&one, &other), overlap(&other, &one), "the other way round");
            let all = subjects.iter().filter(|subject| covers(&other, subject)).all(|subject| covers(&one, subject));
            assert_eq!(covers(&one, &other), all, "covers");
        });
    }

    /// Whatever is given as a name is a name or refused; names make subjects that NATS takes.
    #[test]
    fn any_name_is_checked() {
        let name = || "[A-Za-z0-9_.*>/ -]{0,12}|\\PC{0,8}";
        check("names as typed", 6_000, (name(), name(), name()), |(stream, consumer, subject)| {
            let is_subject = check_subject("--subject", &subject).is_ok();
            let args = NameArgs {
                stream: stream.clone(),
                consumer: consumer.clone(),
                verdict_stream: "VERDICTS".into(),
                verdict_subject: subject.clone(),
                dead_stream: "DEAD".into(),
                dead_subject: "dead".into(),
                replay_subject: "replay".into(),
                parked_stream: "PARKED".into(),
                parked_subject: "parked".into(),
            };
            let Ok(names) = args.resolve() else { return };
            assert!(is_subject && !stream.is_empty() && !consumer.is_empty());
            let id = "MAIL:1:c:2";
            for subject in [names.dead_subject(id), names.verdict_subject("q", id), names.replay_subject("a.b")] {
                check_subject("made", &subject).expect("a subject");
            }
            let replay = names.replay_subject("a.b");
            assert_eq!(names.replayed(&replay), Some((consumer.as_str(), "a.b")));
        });
    }
}
