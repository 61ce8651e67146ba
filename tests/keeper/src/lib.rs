//! A guest for the tests that does with its bucket what the lines of the mail say, one after another, and gives what
//! came of each as a reason. It wants to be granted `wasi:keyvalue` and `mailroom:triage/claims`.
#![expect(missing_docs, reason = "the generated bindings have no documentation of their own")]

wit_bindgen::generate!({ path: "../../wit", world: "triage", generate_all });

use exports::mailroom::triage::handler;
use mailroom::triage::claims;
use mailroom::triage::types::{Failure, Issue, Message, Priority, Retry, Verdict};
use wasi::keyvalue::store::{self, Bucket, Error};
use wasi::keyvalue::{atomics, batch};

struct Keeper;

impl handler::Guest for Keeper {
    /// A line that begins with `try` may fail, and its error is a reason; any other that fails has the mail come again.
    fn triage(message: Message) -> Result<Verdict, Failure> {
        let text = String::from_utf8_lossy(&message.data);
        let mut reasons = Vec::new();
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let (may_fail, words) = match &words[..] {
                ["try", words @ ..] => (true, words),
                words => (false, words),
            };
            reasons.push(match act(words) {
                Ok(said) => said,
                Err(error) if may_fail => told(&error),
                Err(error) => return Err(Failure::Retry(Retry { after_ms: Some(200), reason: told(&error) })),
            });
        }
        let issue = Issue::New(message.id);
        Ok(Verdict { priority: Priority::Normal, issue, queue: "kept".to_owned(), reasons })
    }
}

export!(Keeper);

fn act(words: &[&str]) -> Result<String, Error> {
    let bucket = || store::open("default");
    match words {
        ["open", identifier] => store::open(identifier).map(|_| "opened".to_owned()),
        ["get", key] => Ok(shown(bucket()?.get(key)?)),
        ["set", key, value] => done(bucket()?.set(key, value.as_bytes())),
        ["fill", key, bytes] => done(bucket()?.set(key, &vec![b'x'; number(bytes)? as usize])),
        ["long", bytes] => done(bucket()?.set(&"k".repeat(number(bytes)? as usize), b"")),
        ["delete", key] => done(bucket()?.delete(key)),
        ["exists", key] => Ok(bucket()?.exists(key)?.to_string()),
        ["keys"] => keys(&bucket()?),
        ["get-many", keys @ ..] => {
            let keys: Vec<String> = keys.iter().map(|&key| key.to_owned()).collect();
            let found = batch::get_many(&bucket()?, &keys)?;
            let shown = found.into_iter().map(|found| match found {
                Some((key, value)) => format!("{key}={}", shown(Some(value))),
                None => shown(None),
            });
            Ok(shown.collect::<Vec<_>>().join(" "))
        }
        ["set-many", pairs @ ..] => {
            let pairs = pairs.iter().filter_map(|pair| pair.split_once('='));
            let pairs: Vec<_> = pairs.map(|(key, value)| (key.to_owned(), value.as_bytes().to_vec())).collect();
            done(batch::set_many(&bucket()?, &pairs))
        }
        ["delete-many", keys @ ..] => {
            let keys: Vec<String> = keys.iter().map(|&key| key.to_owned()).collect();
            done(batch::delete_many(&bucket()?, &keys))
        }
        ["increment", key, delta] => Ok(atomics::increment(&bucket()?, key, number(delta)?)?.to_string()),
        ["claim", key, value] => Ok(shown(Some(claims::claim(&bucket()?, key, value.as_bytes())?))),
        _ => Err(Error::Other(format!("no command {words:?}"))),
    }
}

/// All keys, however many answers they take.
fn keys(bucket: &Bucket) -> Result<String, Error> {
    let (mut all, mut cursor) = (Vec::new(), None);
    loop {
        let page = bucket.list_keys(cursor)?;
        all.extend(page.keys);
        match page.cursor {
            Some(next) => cursor = Some(next),
            None if all.len() > 20 => return Ok(all.len().to_string()),
            None => return Ok(all.join(" ")),
        }
    }
}

fn number(word: &str) -> Result<u64, Error> {
    word.parse().map_err(|_| Error::Other(format!("{word} is no number")))
}

fn done(result: Result<(), Error>) -> Result<String, Error> {
    result.map(|()| "done".to_owned())
}

fn shown(value: Option<Vec<u8>>) -> String {
    value.map_or_else(|| "nothing".to_owned(), |value| String::from_utf8_lossy(&value).into_owned())
}

fn told(error: &Error) -> String {
    match error {
        Error::NoSuchStore => "no such store".to_owned(),
        Error::AccessDenied => "access denied".to_owned(),
        Error::Other(text) => text.clone(),
    }
}
