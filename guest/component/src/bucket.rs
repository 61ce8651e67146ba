//! The memory that the host grants: a bucket of `wasi:keyvalue`.

use crate::mailroom::triage::claims;
use crate::wasi::keyvalue::{batch, store};
use guest::memory::{Away, Memory};

/// What the bucket is called here; the operator says which one it is.
const NAME: &str = "default";

/// The bucket.
pub struct Shared {
    bucket: store::Bucket,
}

impl Shared {
    /// Opens it.
    ///
    /// # Errors
    /// Why there is none.
    pub fn open() -> Result<Shared, String> {
        store::open(NAME).map(|bucket| Shared { bucket }).map_err(|error| explain(&error))
    }
}

impl Memory for Shared {
    fn get_many(&mut self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, Away> {
        let answers = batch::get_many(&self.bucket, keys).map_err(away)?;
        Ok(answers.into_iter().map(|answer| answer.map(|(_, value)| value)).collect())
    }

    fn set_many(&mut self, entries: &[(String, Vec<u8>)]) -> Result<(), Away> {
        batch::set_many(&self.bucket, entries).map_err(away)
    }

    fn claim(&mut self, key: &str, value: &[u8]) -> Result<Vec<u8>, Away> {
        claims::claim(&self.bucket, key, value).map_err(away)
    }
}

fn away(error: store::Error) -> Away {
    Away(explain(&error))
}

fn explain(error: &store::Error) -> String {
    match error {
        store::Error::NoSuchStore => format!("memory: no bucket {NAME:?}"),
        store::Error::AccessDenied => "memory: access denied".to_owned(),
        store::Error::Other(reason) => format!("memory: {reason}"),
    }
}
