//! Which words speak for what, and how to change that without building a new guest.
//!
//! | configuration key | value | without it |
//! |---|---|---|
//! | `queue.default` | the queue of a mail that nothing speaks for | `inbox` |
//! | `queue.NAME` | the words that speak for queue `NAME`, in place of its default words; none: the queue is gone | [`QUEUES`] |
//! | `route.NAME` | a rule that comes before everything else, see [`crate::routes`] | no rules |
//! | `team.confidence` | 0 to 1: how sure a model has to be to decide | as it was trained |
//! | `issue.keys` | patterns of issue keys in subjects, see [`crate::keys`] | the usual ones |
//! | `heat.mails` | from how many follow-ups within an hour an issue's priority is raised, 0 to 16; 0: never | 5 |
//! | `priority.urgent`, `priority.high`, `priority.low` | the words that speak for this priority, in place of the default ones | [`URGENT`], [`HIGH`], [`LOW`] |
//!
//! Words and phrases are separated by commas: `queue.billing = "invoice, credit note, Rechnung"`. Case does not
//! matter. How words are weighed is told in [`crate::queue`] and [`crate::priority`], how they are found in
//! [`crate::words`].

use std::borrow::Cow;
use std::mem;

use crate::Priority;
use crate::keys::Keys;
use crate::model::Model;
use crate::queue;
use crate::routes::{ROUTES_MAX, Route};
use crate::words::{self, Entry, Lexicon, Topic, normal};

/// The queue of a mail that nothing speaks for.
pub const DEFAULT_QUEUE: &str = "inbox";

/// The queues with the words that speak for each. At a draw the first one takes the mail.
pub const QUEUES: &[(&str, &[&str])] = &[
    (
        "security",
        &[
            "abuse",
            "breach",
            "compromised",
            "cve",
            "data leak",
            "exploit",
            "hacked",
            "malware",
            "phishing",
            "psirt",
            "ransomware",
            "schwachstelle",
            "security",
            "sicherheitslücke",
            "sql injection",
            "unauthorized access",
            "vulnerability",
            "vulnerabilities",
            "vulnérabilité",
            "xss",
        ],
    ),
    (
        "operations",
        &[
            "alert",
            "ausfall",
            "delivery status notification",
            "disk full",
            "disk space",
            "down",
            "downtime",
            "failover",
            "incident",
            "maintenance",
            "monitoring",
            "noc",
            "offline",
            "ops",
            "outage",
            "panne",
            "postmaster",
            "production",
            "störung",
            "timeouts",
            "undeliverable",
            "undelivered mail",
            "unreachable",
            "wartung",
        ],
    ),
    (
        "billing",
        &[
            "accounting",
            "bank transfer",
            "buchhaltung",
            "charged",
            "credit note",
            "direct debit",
            "facturation",
            "facture",
            "gutschrift",
            "invoice",
            "invoices",
            "mahnung",
            "overcharged",
            "overdue",
            "paiement",
            "payment",
            "payments",
            "receipt",
            "rechnung",
            "rechnungen",
            "refund",
            "remboursement",
            "vat",
            "überweisung",
        ],
    ),
    (
        "sales",
        &[
            "angebot",
            "demo",
            "devis",
            "discount",
            "enterprise plan",
            "licences",
            "licenses",
            "preisliste",
            "price list",
            "pricing",
            "proposal",
            "purchase",
            "quotation",
            "quote",
            "request for quote",
            "reseller",
            "tarifs",
            "trial",
            "upgrade our plan",
            "volume discount",
        ],
    ),
    (
        "support",
        &[
            "bug",
            "cannot log in",
            "crash",
            "crashes",
            "does not work",
            "doesn t work",
            "error",
            "error message",
            "fehler",
            "fehlermeldung",
            "forgot my password",
            "funktioniert nicht",
            "help",
            "helpdesk",
            "hilfe",
            "how do i",
            "installation",
            "locked out",
            "log in",
            "login",
            "mot de passe",
            "ne fonctionne pas",
            "not working",
            "password",
            "passwort",
            "reset",
            "ticket",
        ],
    ),
    (
        "bulk",
        &[
            "act now",
            "casino",
            "click here",
            "congratulations",
            "digest",
            "free gift",
            "free money",
            "limited offer",
            "limited time",
            "lottery",
            "million dollars",
            "newsletter",
            "no obligation",
            "prize",
            "risk free",
            "special offer",
            "unsubscribe",
            "view in browser",
            "webinar",
            "weight loss",
            "winner",
            "you have won",
        ],
    ),
];

/// Words of somebody who cannot wait.
pub const URGENT: &[&str] = &[
    "as soon as possible",
    "asap",
    "cannot work",
    "critical",
    "data loss",
    "dringend",
    "emergency",
    "hacked",
    "immediately",
    "is down",
    "notfall",
    "on fire",
    "outage",
    "p1",
    "production down",
    "ransomware",
    "sev1",
    "site down",
    "sofort",
    "urgence",
    "urgent",
    "urgently",
];

/// Words of somebody who would rather not wait.
pub const HIGH: &[&str] = &[
    "blocked",
    "blocking",
    "breach",
    "broken",
    "deadline",
    "escalate",
    "escalation",
    "final notice",
    "important",
    "mahnung",
    "overdue",
    "p2",
    "sev2",
    "störung",
    "today",
    "vulnerability",
    "wichtig",
];

/// Words of somebody who has time, or of nobody.
pub const LOW: &[&str] = &[
    "abwesenheitsnotiz",
    "at your convenience",
    "automatic reply",
    "feedback",
    "for your information",
    "fyi",
    "how about",
    "low priority",
    "minor",
    "no hurry",
    "no rush",
    "nice to have",
    "out of office",
    "suggestion",
    "thank you for",
    "typo",
    "when you have time",
];

/// At most this many queues.
pub const QUEUES_MAX: usize = 64;
/// At most this many words for a topic.
const WORDS_MAX: usize = 500;
/// No word or phrase is longer than this.
const WORD_MAX_BYTES: usize = 100;

/// So many follow-ups within an hour raise the priority of an issue.
pub const DEFAULT_HEAT: u32 = 5;
/// No more than this can be asked for.
pub const HEAT_MAX: u32 = 16;

/// The name of the queue for mail that nobody in particular has to read.
pub const BULK: &str = "bulk";

/// The rules that a mail is judged by.
#[derive(Clone, Debug)]
pub struct Rules {
    queues: Cow<'static, [Cow<'static, str>]>,
    default_queue: Cow<'static, str>,
    bulk: Option<u8>,
    keys: Keys,
    heat: u32,
    routes: Vec<Route>,
    team: Option<Model<'static>>,
    urgency: Option<Model<'static>>,
    /// The confidence below which the team's model does not decide, in place of its own.
    confidence: Option<f32>,
    /// None: the default one, which the compiler made.
    lexicon: Option<Box<Lexicon>>,
}

impl Rules {
    /// The rules of a guest without configuration. Costs nothing.
    pub fn defaults() -> Rules {
        Rules {
            queues: Cow::Borrowed(&DEFAULT_QUEUES),
            default_queue: Cow::Borrowed(DEFAULT_QUEUE),
            bulk: DEFAULT_BULK,
            keys: Keys::default(),
            heat: DEFAULT_HEAT,
            routes: Vec::new(),
            team: None,
            urgency: None,
            confidence: None,
            lexicon: None,
        }
    }

    /// The default rules, changed as the pairs of key and value say. The order of the pairs does not matter; of a
    /// repeated key the last one counts.
    ///
    /// # Errors
    /// What is wrong with which key, and what is accepted.
    pub fn from_config<K: AsRef<str>, V: AsRef<str>>(pairs: impl IntoIterator<Item = (K, V)>) -> Result<Rules, String> {
        let pairs: Vec<(K, V)> = pairs.into_iter().collect();
        if pairs.is_empty() {
            return Ok(Rules::defaults());
        }
        Self::changed(pairs)
    }

    /// [`Rules::from_config`] with pairs. A call of its own: sorting has 4 KiB on the stack, which as a part of the caller's
    /// would be there without pairs too.
    #[inline(never)]
    fn changed<K: AsRef<str>, V: AsRef<str>>(mut pairs: Vec<(K, V)>) -> Result<Rules, String> {
        pairs.sort_by(|(a, _), (b, _)| a.as_ref().cmp(b.as_ref()));

        let mut default_queue = Cow::Borrowed(DEFAULT_QUEUE);
        let (mut keys, mut heat, mut confidence) = (Keys::default(), DEFAULT_HEAT, None);
        let mut routes = Vec::new();
        let mut topics = [URGENT, HIGH, LOW].map(Words::Default);
        let mut queues: Vec<(Cow<'static, str>, Words)> =
            QUEUES.iter().map(|&(name, words)| (Cow::Borrowed(name), Words::Default(words))).collect();
        for (key, value) in &pairs {
            let (key, value) = (key.as_ref(), value.as_ref());
            match key {
                "queue.default" => default_queue = Cow::Owned(queue_name(key, value.trim())?.to_owned()),
                "issue.keys" => keys = Keys::read(value).map_err(|error| format!("{key:?}: {error}"))?,
                "heat.mails" => {
                    let number = value.trim().parse().ok().filter(|number| *number <= HEAT_MAX);
                    heat = number.ok_or_else(|| format!("{key:?} is {value:?}; it takes 0 to {HEAT_MAX}"))?;
                }
                "team.confidence" => {
                    let number = value.trim().parse().ok().filter(|number| (0.0..=1.0).contains(number));
                    confidence = Some(number.ok_or_else(|| format!("{key:?} is {value:?}; it takes 0 to 1"))?);
                }
                "priority.urgent" => topics[0] = Words::read(key, value)?,
                "priority.high" => topics[1] = Words::read(key, value)?,
                "priority.low" => topics[2] = Words::read(key, value)?,
                _ => {
                    if let Some(name) = key.strip_prefix("route.") {
                        routes.push(Route::read(name, value).map_err(|error| format!("{key:?}: {error}"))?);
                        continue;
                    }
                    let Some(name) = key.strip_prefix("queue.") else { return Err(unknown(key)) };
                    let name = queue_name(key, name)?;
                    let words = Words::read(key, value)?;
                    match queues.iter_mut().find(|(known, _)| known == name) {
                        Some((_, known)) => *known = words,
                        None => queues.push((Cow::Owned(name.to_owned()), words)),
                    }
                }
            }
        }
        if routes.len() > ROUTES_MAX {
            return Err(format!("{} keys route.NAME, at most {ROUTES_MAX} are possible", routes.len()));
        }
        queues.retain(|(_, words)| !words.is_empty());
        if queues.len() > QUEUES_MAX {
            return Err(format!("{} queues, at most {QUEUES_MAX} are possible", queues.len()));
        }

        let priorities = topics.iter().zip([Topic::Urgent, Topic::High, Topic::Low]);
        let by_queue = queues.iter().enumerate().map(|(index, (_, words))| (words, Topic::Queue(index as u8)));
        let lexicon = Lexicon::of(
            priorities.chain(by_queue).flat_map(|(words, topic)| words.iter().map(move |word| (word, topic))),
        );
        let names: Vec<_> = queues.into_iter().map(|(name, _)| name).collect();
        Ok(Rules {
            bulk: names.iter().position(|name| name == BULK).map(|index| index as u8),
            queues: Cow::Owned(names),
            default_queue,
            keys,
            heat,
            routes,
            team: None,
            urgency: None,
            confidence,
            lexicon: Some(Box::new(lexicon)),
        })
    }

    /// The same rules with a model that was learned, of who takes what, in place of the words that speak for queues.
    ///
    /// # Errors
    /// Why this is no such model.
    pub fn with_team_model(self, file: &'static [u8]) -> Result<Rules, String> {
        let model = Model::read(file)?;
        match model.labels().find(|label| !queue::is_name(label)) {
            Some(label) => Err(format!("the model has the label {label:?}, which is no queue name")),
            None => Ok(Rules { team: Some(model), ..self }),
        }
    }

    /// The same rules with a model that was learned, of how soon somebody has to look, beside the words.
    ///
    /// # Errors
    /// Why this is no such model.
    pub fn with_priority_model(self, file: &'static [u8]) -> Result<Rules, String> {
        let model = Model::read(file)?;
        match model.labels().find(|label| Priority::of(label).is_none()) {
            Some(label) => Err(format!("the model has the label {label:?}, which is no priority")),
            None => Ok(Rules { urgency: Some(model), ..self }),
        }
    }

    /// The operator's rules, in their order.
    pub fn routes(&self) -> &[Route] {
        &self.routes
    }

    /// The model of who takes what.
    pub fn team_model(&self) -> Option<Model<'static>> {
        self.team.map(|model| match self.confidence {
            Some(confidence) => model.with_threshold(confidence),
            None => model,
        })
    }

    /// The model of how soon somebody has to look.
    pub fn priority_model(&self) -> Option<Model<'static>> {
        self.urgency
    }

    /// Whether there is such a queue.
    pub fn knows_queue(&self, name: &str) -> bool {
        self.queues.iter().any(|known| known == name)
            || self.default_queue == name
            || self.routes.iter().any(|route| route.queue == name)
            || self.team.is_some_and(|model| model.labels().any(|label| label == name))
    }

    /// The words to look for.
    pub fn lexicon(&self) -> &Lexicon {
        self.lexicon.as_deref().unwrap_or(&DEFAULT_LEXICON)
    }

    /// The queues in order of precedence. [`Topic::Queue`] has an index into this.
    pub fn queues(&self) -> &[Cow<'static, str>] {
        &self.queues
    }

    /// The queue for newsletters, mailing lists and advertisements, unless it was configured away.
    pub fn bulk(&self) -> Option<u8> {
        self.bulk
    }

    /// The issue keys to look for in subjects.
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    /// From how many follow-ups within an hour on an issue is urgent; 0: never.
    pub fn heat(&self) -> u32 {
        self.heat
    }

    /// The name of a queue; without an index that of the default queue.
    pub fn queue_name(&self, index: Option<u8>) -> &str {
        index.map_or(&self.default_queue, |index| &self.queues[usize::from(index)])
    }
}

/// The words for a topic.
enum Words {
    Default(&'static [&'static str]),
    Configured(Vec<String>),
}

impl Words {
    fn read(key: &str, value: &str) -> Result<Words, String> {
        let words: Vec<String> = value.split(',').map(normal).filter(|word| !word.is_empty()).collect();
        if words.len() > WORDS_MAX {
            return Err(format!("{key:?} has {} words, at most {WORDS_MAX} are possible", words.len()));
        }
        match words.iter().find(|word| word.len() > WORD_MAX_BYTES) {
            Some(word) => {
                Err(format!("{key:?} has a word of {} bytes, at most {WORD_MAX_BYTES} are possible", word.len()))
            }
            None => Ok(Words::Configured(words)),
        }
    }

    fn is_empty(&self) -> bool {
        matches!(self, Words::Configured(words) if words.is_empty())
    }

    fn iter(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match self {
            Words::Default(words) => Box::new(words.iter().copied()),
            Words::Configured(words) => Box::new(words.iter().map(String::as_str)),
        }
    }
}

fn queue_name<'a>(key: &str, name: &'a str) -> Result<&'a str, String> {
    if queue::is_name(name) {
        Ok(name)
    } else {
        Err(format!("{key:?} names the queue {name:?}; a queue name is 1 to 64 of a-z, 0-9, '_' and '-'"))
    }
}

fn unknown(key: &str) -> String {
    format!(
        "unknown key {key:?}; known are queue.default, queue.NAME, route.NAME, priority.urgent, priority.high, \
         priority.low, issue.keys, heat.mails and team.confidence"
    )
}

/// How many words the default rules have, and how many bytes.
const DEFAULT_SIZE: (usize, usize) = {
    let mut size = (0, 0);
    size = add_size(size, URGENT);
    size = add_size(size, HIGH);
    size = add_size(size, LOW);
    let mut queue = 0;
    while queue < QUEUES.len() {
        size = add_size(size, QUEUES[queue].1);
        queue += 1;
    }
    size
};

const fn add_size((mut count, mut bytes): (usize, usize), words: &[&str]) -> (usize, usize) {
    let mut word = 0;
    while word < words.len() {
        count += 1;
        bytes += words[word].len();
        word += 1;
    }
    (count, bytes)
}

const DEFAULT_BULK: Option<u8> = Some(QUEUES.len() as u8 - 1);

static DEFAULT_QUEUES: [Cow<'static, str>; QUEUES.len()] = {
    let mut names = [const { Cow::Borrowed("") }; QUEUES.len()];
    let mut queue = 0;
    while queue < QUEUES.len() {
        // An assignment would drop the old name, which the compiler cannot do at compile time.
        mem::forget(mem::replace(&mut names[queue], Cow::Borrowed(QUEUES[queue].0)));
        queue += 1;
    }
    names
};

static DEFAULT_LEXICON: Lexicon = Lexicon::of_sorted(&DEFAULT_TABLE.text, &DEFAULT_TABLE.entries);

static DEFAULT_TABLE: Table = {
    let mut table = Table {
        text: [0; DEFAULT_SIZE.1],
        entries: [Entry::new(b"-", 0, 1, Topic::Low); DEFAULT_SIZE.0],
        count: 0,
        bytes: 0,
    };
    table = table.with(URGENT, Topic::Urgent);
    table = table.with(HIGH, Topic::High);
    table = table.with(LOW, Topic::Low);
    let mut queue = 0;
    while queue < QUEUES.len() {
        table = table.with(QUEUES[queue].1, Topic::Queue(queue as u8));
        queue += 1;
    }
    assert!(table.count == DEFAULT_SIZE.0 && table.bytes == DEFAULT_SIZE.1);
    table.entries = words::sort(table.entries);
    table
};

/// The default words in the making.
struct Table {
    text: [u8; DEFAULT_SIZE.1],
    entries: [Entry; DEFAULT_SIZE.0],
    count: usize,
    bytes: usize,
}

impl Table {
    const fn with(mut self, words: &[&str], topic: Topic) -> Table {
        let mut word = 0;
        while word < words.len() {
            let (phrase, start) = (words[word].as_bytes(), self.bytes);
            while self.bytes - start < phrase.len() {
                self.text[self.bytes] = phrase[self.bytes - start];
                self.bytes += 1;
            }
            self.entries[self.count] = Entry::new(&self.text, start, self.bytes, topic);
            self.count += 1;
            word += 1;
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: [(&str, &str); 0] = [];

    /// A word that could never be found would be a silent mistake in the rules.
    #[test]
    fn default_words_can_be_found() {
        let words = QUEUES.iter().flat_map(|(_, words)| *words).chain(URGENT).chain(HIGH).chain(LOW);
        for word in words {
            assert_eq!(normal(word), *word);
        }
        assert_eq!(Rules::defaults().queue_name(Rules::defaults().bulk()), BULK);
    }

    /// The table that the compiler makes is the one that configuration would make.
    #[test]
    fn defaults_are_an_empty_configuration() {
        let defaults = Rules::from_config(NOTHING).expect("defaults");
        assert!(defaults.lexicon.is_none());
        let same = Rules::from_config([("queue.default", "inbox")]).expect("rules");
        assert!(same.lexicon().entries().eq(Rules::defaults().lexicon().entries()));
        assert_eq!(same.queues(), Rules::defaults().queues());
    }

    /// An operator can move words, add a queue and take one away.
    #[test]
    fn configuration_replaces_words() {
        let rules = Rules::from_config([
            ("queue.returns", "Send back, RMA"),
            ("queue.bulk", ""),
            ("queue.default", "front-desk"),
            ("priority.urgent", "fire"),
        ])
        .expect("rules");
        let verdict =
            |subject: &str| crate::triage(format!("Subject: {subject}\n\n").as_bytes(), &rules).expect("a verdict");
        assert_eq!(verdict("rma 12, broken").queue, "returns");
        assert_eq!(verdict("I want to send it back, or send-back").queue, "returns");
        assert_eq!(verdict("newsletter").queue, "front-desk");
        assert_eq!(verdict("fire").priority, Priority::Urgent);
        assert_eq!(verdict("urgent").priority, Priority::Normal);
    }

    /// A mistake is answered with the key and what would be right.
    #[test]
    fn mistakes_name_the_key() {
        for (key, value, expected) in [
            ("queues.x", "y", "unknown key \"queues.x\"; known are queue.default"),
            ("queue.Über", "y", "\"queue.Über\" names the queue \"Über\"; a queue name is"),
            ("queue.default", "two words", "\"queue.default\" names the queue \"two words\""),
            ("priority.high", &"a".repeat(101), "\"priority.high\" has a word of 101 bytes"),
            ("queue.x", &"a,".repeat(501), "\"queue.x\" has 501 words"),
        ] {
            let error = Rules::from_config([(key, value)]).expect_err(key);
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
