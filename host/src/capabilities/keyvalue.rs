//! `wasi:keyvalue` and `mailroom:triage/claims`: what instances remember for each other, in a bucket that the operator
//! names.
//!
//! There is one bucket for all guests of a host. What goes wrong with it the guest is told as an error, and decides: most
//! will ask for another delivery. Nothing is cached, so that an instance reads what any other, on any host, wrote before.

use super::{Grants, State};
use crate::interface::claims;
use crate::interface::wasi::keyvalue::store::{Error, KeyResponse};
use crate::interface::wasi::keyvalue::{atomics, batch, store};
use crate::names::check_bucket;
use crate::nats::{find, innermost};
use crate::sink::is_too_large;
use anyhow::{Result, bail};
use async_nats::HeaderMap;
use async_nats::jetstream::context::{GetStreamError, GetStreamErrorKind, PublishError};
use async_nats::jetstream::kv::{Store, UpdateErrorKind};
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{DirectGetErrorKind, LastRawMessageErrorKind};
use async_nats::jetstream::{Context, ErrorCode};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use wasmtime::component::Resource;

/// Longest key in bytes, as the guest writes it.
const KEY_MAX_BYTES: usize = 1 << 10;

/// Most bytes of keys and values that [`KeyValue::Memory`] holds.
const MEMORY_MAX_BYTES: usize = 64 << 20;

/// Most keys in one answer to `list-keys`.
const PAGE_KEYS: usize = 1_000;

/// Entries of a batch that are read or written at the same time.
const BATCH_WIDTH: usize = 64;

/// So often a change is tried again that others were faster to make.
const TRIES: u32 = 16;

/// Before a key that NATS would not take, which is encoded.
const ENCODED: char = '=';

/// Where the guest's keys and values are, as the operator says with `--keyvalue`.
#[derive(Debug, Clone, Default)]
pub enum KeyValue {
    /// Nowhere: a component that imports the interface is refused.
    #[default]
    None,
    /// In this process, and gone with it: 64 MiB at most.
    Memory(Arc<Mutex<Entries>>),
    /// In a bucket on the NATS server, which hosts share.
    Nats(Arc<NatsBucket>),
}

impl FromStr for KeyValue {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            None if text == "memory" => Ok(Self::Memory(Arc::default())),
            Some(("nats", name)) => {
                check_bucket("nats:BUCKET", name).map_err(|err| err.to_string())?;
                Ok(Self::Nats(Arc::new(NatsBucket { name: name.to_owned(), place: OnceLock::new() })))
            }
            _ => Err("nats:BUCKET, memory or none".to_owned()),
        }
    }
}

impl KeyValue {
    /// The bucket on the NATS server, if it is there that the guest remembers.
    pub fn nats(&self) -> Option<Arc<NatsBucket>> {
        match self {
            Self::Nats(bucket) => Some(bucket.clone()),
            Self::None | Self::Memory(_) => None,
        }
    }

    fn opens(&self, identifier: &str) -> bool {
        match self {
            Self::None => false,
            Self::Memory(_) => ["", "default", "memory"].contains(&identifier),
            Self::Nats(bucket) => ["", "default", &bucket.name].contains(&identifier),
        }
    }

    async fn get(&self, key: &str) -> Result<Option<Bytes>, Error> {
        check_key(key)?;
        match self {
            Self::None => Err(Error::NoSuchStore),
            Self::Memory(entries) => Ok(lock(entries).values.get(key).cloned()),
            Self::Nats(bucket) => Ok(bucket.within(bucket.read(key)).await?.value),
        }
    }

    async fn set(&self, key: &str, value: Bytes) -> Result<(), Error> {
        check_key(key)?;
        match self {
            Self::None => Err(Error::NoSuchStore),
            Self::Memory(entries) => lock(entries).set(key, value),
            Self::Nats(bucket) => bucket.within(bucket.set(key, value)).await,
        }
    }

    async fn delete(&self, key: &str) -> Result<(), Error> {
        check_key(key)?;
        match self {
            Self::None => Err(Error::NoSuchStore),
            Self::Memory(entries) => {
                lock(entries).remove(key);
                Ok(())
            }
            Self::Nats(bucket) => bucket.within(bucket.delete(key)).await,
        }
    }

    /// A page of keys in their order, from the `cursor`th on.
    async fn keys(&self, cursor: Option<u64>) -> Result<KeyResponse, Error> {
        let keys: Vec<String> = match self {
            Self::None => return Err(Error::NoSuchStore),
            Self::Memory(entries) => lock(entries).values.keys().cloned().collect(),
            Self::Nats(bucket) => bucket.within(bucket.keys()).await?,
        };
        let from = usize::try_from(cursor.unwrap_or(0)).unwrap_or(usize::MAX).min(keys.len());
        let to = keys.len().min(from + PAGE_KEYS);
        Ok(KeyResponse { keys: keys[from..to].to_vec(), cursor: (to < keys.len()).then_some(to as u64) })
    }

    /// Changes the entry from what it is to what `change` makes of it, which says nothing where it may stay; returns
    /// the value that is there then.
    async fn change(
        &self,
        key: &str,
        change: impl Fn(Option<&Bytes>) -> Result<Option<Bytes>, Error>,
    ) -> Result<Bytes, Error> {
        check_key(key)?;
        match self {
            Self::None => Err(Error::NoSuchStore),
            Self::Memory(entries) => {
                let mut entries = lock(entries);
                let old = entries.values.get(key).cloned();
                match (change(old.as_ref())?, old) {
                    (Some(new), _) => entries.set(key, new.clone()).map(|()| new),
                    (None, Some(old)) => Ok(old),
                    (None, None) => Err(other("nothing to keep")),
                }
            }
            Self::Nats(bucket) => bucket.within(bucket.change(key, change)).await,
        }
    }
}

fn check_key(key: &str) -> Result<(), Error> {
    match key.len() {
        0 => Err(other("the key is empty")),
        1..=KEY_MAX_BYTES => Ok(()),
        bytes => Err(other(format_args!("the key has {bytes} bytes; at most {KEY_MAX_BYTES}"))),
    }
}

fn other(text: impl Display) -> Error {
    Error::Other(text.to_string())
}

/// The entries of [`KeyValue::Memory`].
#[derive(Debug, Default)]
pub struct Entries {
    values: BTreeMap<String, Bytes>,
    bytes: usize,
}

/// A panic while the lock was held left whole entries behind.
fn lock(entries: &Mutex<Entries>) -> MutexGuard<'_, Entries> {
    entries.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Entries {
    fn set(&mut self, key: &str, value: Bytes) -> Result<(), Error> {
        let old = self.values.get(key).map_or(0, |old| key.len() + old.len());
        let bytes = self.bytes - old + key.len() + value.len();
        if bytes > MEMORY_MAX_BYTES {
            return Err(other(format_args!("the memory is full: {MEMORY_MAX_BYTES} bytes of keys and values")));
        }
        self.bytes = bytes;
        self.values.insert(key.to_owned(), value);
        Ok(())
    }

    fn remove(&mut self, key: &str) {
        if let Some(old) = self.values.remove(key) {
            self.bytes -= key.len() + old.len();
        }
    }
}

/// A key-value bucket of JetStream's (ADR-8).
#[derive(Debug)]
pub struct NatsBucket {
    name: String,
    place: OnceLock<Place>,
}

/// Where a bucket is, once there is a connection.
#[derive(Debug)]
struct Place {
    store: Store,
    /// Longest wait for one operation.
    patience: Duration,
    /// Whether any server may answer: with copies on several, one that lags would tell of the past.
    is_single: bool,
}

/// What lies under a key, and as which change of the bucket.
struct Found {
    /// 0 where nothing ever was.
    revision: u64,
    /// Nothing where it was deleted, or never was.
    value: Option<Bytes>,
}

impl NatsBucket {
    /// Looks for the bucket. What guests ask of it then takes at most `patience`, and fails after that.
    ///
    /// # Errors
    /// It is not there, or may not be looked for.
    pub async fn open(&self, jetstream: &Context, patience: Duration) -> Result<()> {
        let name = &self.name;
        let store = match jetstream.get_key_value(name).await {
            Ok(store) => store,
            Err(err) => {
                let missing = find::<GetStreamError>(&err).is_some_and(|err| match err.kind() {
                    GetStreamErrorKind::JetStream(cause) => cause.error_code() == ErrorCode::STREAM_NOT_FOUND,
                    _ => false,
                });
                match missing {
                    true => bail!("no key-value bucket {name}; `host provision --bucket {name}` makes it"),
                    false => bail!("--keyvalue nats:{name}: {}", innermost(&err)),
                }
            }
        };
        let config = &store.stream.cached_info().config;
        let is_single = config.allow_direct && config.num_replicas <= 1;
        let _ = self.place.set(Place { store, patience, is_single });
        Ok(())
    }

    fn place(&self) -> Result<&Place, Error> {
        self.place.get().ok_or_else(|| other("there is no connection to NATS yet"))
    }

    async fn within<T>(&self, operation: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let patience = self.place()?.patience;
        match tokio::time::timeout(patience, operation).await {
            Ok(done) => done,
            Err(_) => Err(other(format_args!("bucket {}: no answer within {patience:?}", self.name))),
        }
    }

    async fn read(&self, key: &str) -> Result<Found, Error> {
        let Place { store, is_single, .. } = self.place()?;
        let subject = format!("{}{}", store.prefix, nats_key(key));
        let nothing = Found { revision: 0, value: None };
        let message = if *is_single {
            match store.stream.direct_get_last_for_subject(subject).await {
                Ok(message) => message,
                Err(err) if err.kind() == DirectGetErrorKind::NotFound => return Ok(nothing),
                Err(err) => return Err(self.failed("read", err)),
            }
        } else {
            match store.stream.get_last_raw_message_by_subject(&subject).await {
                Ok(message) => message,
                Err(err) => match err.kind() {
                    LastRawMessageErrorKind::NoMessageFound => return Ok(nothing),
                    LastRawMessageErrorKind::JetStream(ref cause)
                        if cause.error_code() == ErrorCode::NO_MESSAGE_FOUND =>
                    {
                        return Ok(nothing);
                    }
                    _ => return Err(self.failed("read", err)),
                },
            }
        };
        Ok(Found { revision: message.sequence, value: (!is_deleted(&message)).then_some(message.payload) })
    }

    async fn set(&self, key: &str, value: Bytes) -> Result<(), Error> {
        let bytes = value.len();
        match self.place()?.store.put(nats_key(key), value).await {
            Ok(_) => Ok(()),
            Err(err) => Err(self.not_stored(bytes, err)),
        }
    }

    async fn delete(&self, key: &str) -> Result<(), Error> {
        self.place()?.store.delete(nats_key(key)).await.map_err(|err| self.failed("delete", err))
    }

    async fn keys(&self) -> Result<Vec<String>, Error> {
        let failed = |err: &dyn Display| self.failed("list", err);
        let keys = self.place()?.store.keys().await.map_err(|err| failed(&err))?;
        let mut keys: Vec<String> =
            keys.map_ok(|key: String| guests_key(&key)).try_collect().await.map_err(|err| failed(&err))?;
        keys.sort_unstable();
        Ok(keys)
    }

    /// Takes it first that there is nothing: then one round trip is all.
    async fn change(
        &self,
        key: &str,
        change: impl Fn(Option<&Bytes>) -> Result<Option<Bytes>, Error>,
    ) -> Result<Bytes, Error> {
        let store = &self.place()?.store;
        let mut found = Found { revision: 0, value: None };
        for _ in 0..TRIES {
            let Some(new) = change(found.value.as_ref())? else {
                return found.value.ok_or_else(|| other("nothing to keep"));
            };
            match store.update(nats_key(key), new.clone(), found.revision).await {
                Ok(_) => return Ok(new),
                Err(err) if err.kind() == UpdateErrorKind::WrongLastRevision => found = self.read(key).await?,
                Err(err) => return Err(self.not_stored(new.len(), err)),
            }
        }
        Err(other(format_args!("bucket {}: others changed {key:?} {TRIES} times meanwhile", self.name)))
    }

    fn failed(&self, what: &str, err: impl Display) -> Error {
        other(format_args!("{what} bucket {}: {err}", self.name))
    }

    fn not_stored(&self, bytes: usize, err: impl std::error::Error + 'static) -> Error {
        let why = match find::<PublishError>(&err).is_some_and(is_too_large) {
            true => "more than the server or the bucket takes".to_owned(),
            false => innermost(&err),
        };
        self.failed("write to", format_args!("a value of {bytes} bytes: {why}"))
    }
}

fn is_deleted(message: &StreamMessage) -> bool {
    let operation = |headers: &HeaderMap| headers.get("KV-Operation").map(|operation| operation.as_str().to_owned());
    operation(&message.headers).is_some_and(|operation| operation == "DEL" || operation == "PURGE")
}

/// The key as NATS takes it: as it is, or else `=` and its base64url.
fn nats_key(key: &str) -> String {
    let plain = key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-/_=.".contains(&byte))
        && !key.starts_with([ENCODED, '.'])
        && !key.ends_with('.')
        && !key.contains("..");
    if plain { key.to_owned() } else { format!("{ENCODED}{}", BASE64URL.encode(key)) }
}

/// The key as the guest wrote it.
fn guests_key(key: &str) -> String {
    let decoded = key.strip_prefix(ENCODED).and_then(|encoded| BASE64URL.decode(encoded).ok());
    decoded.and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_else(|| key.to_owned())
}

/// The bucket in a guest's hands. There is one, so it says nothing more.
pub struct Bucket;

impl store::Host for State {
    async fn open(&mut self, identifier: String) -> Result<Resource<Bucket>, Error> {
        if self.grants.keyvalue.opens(&identifier) { Ok(Resource::new_own(0)) } else { Err(Error::NoSuchStore) }
    }
}

impl store::HostBucket for State {
    async fn get(&mut self, _: Resource<Bucket>, key: String) -> Result<Option<Vec<u8>>, Error> {
        let Grants { keyvalue, usage, .. } = &*self.grants;
        Ok(usage.keyvalue("get", keyvalue.get(&key)).await?.map(Vec::from))
    }

    async fn set(&mut self, _: Resource<Bucket>, key: String, value: Vec<u8>) -> Result<(), Error> {
        let Grants { keyvalue, usage, .. } = &*self.grants;
        usage.keyvalue("set", keyvalue.set(&key, value.into())).await
    }

    async fn delete(&mut self, _: Resource<Bucket>, key: String) -> Result<(), Error> {
        let Grants { keyvalue, usage, .. } = &*self.grants;
        usage.keyvalue("delete", keyvalue.delete(&key)).await
    }

    async fn exists(&mut self, _: Resource<Bucket>, key: String) -> Result<bool, Error> {
        let Grants { keyvalue, usage, .. } = &*self.grants;
        Ok(usage.keyvalue("exists", keyvalue.get(&key)).await?.is_some())
    }

    async fn list_keys(&mut self, _: Resource<Bucket>, cursor: Option<u64>) -> Result<KeyResponse, Error> {
        let Grants { keyvalue, usage, .. } = &*self.grants;
        usage.keyvalue("list-keys", keyvalue.keys(cursor)).await
    }

    async fn drop(&mut self, _: Resource<Bucket>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl batch::Host for State {
    async fn get_many(
        &mut self,
        _: Resource<Bucket>,
        keys: Vec<String>,
    ) -> Result<Vec<Option<(String, Vec<u8>)>>, Error> {
        let Grants { keyvalue, usage, .. } = &*self.grants;
        let get = async |key: String| {
            let value = keyvalue.get(&key).await?;
            Ok(value.map(|value| (key, value.into())))
        };
        usage.keyvalue("get-many", stream::iter(keys).map(get).buffered(BATCH_WIDTH).try_collect()).await
    }

    async fn set_many(&mut self, _: Resource<Bucket>, entries: Vec<(String, Vec<u8>)>) -> Result<(), Error> {
        let Grants { keyvalue, usage, .. } = &*self.grants;
        let set = async |(key, value): (String, Vec<u8>)| keyvalue.set(&key, value.into()).await;
        // In their order, as far as one after another matters: of a repeated key the last value counts.
        let last: BTreeMap<String, Vec<u8>> = entries.into_iter().collect();
        usage.keyvalue("set-many", stream::iter(last).map(set).buffer_unordered(BATCH_WIDTH).try_collect()).await
    }

    async fn delete_many(&mut self, _: Resource<Bucket>, keys: Vec<String>) -> Result<(), Error> {
        let Grants { keyvalue, usage, .. } = &*self.grants;
        let delete = async |key: String| keyvalue.delete(&key).await;
        usage.keyvalue("delete-many", stream::iter(keys).map(delete).buffer_unordered(BATCH_WIDTH).try_collect()).await
    }
}

impl atomics::Host for State {
    /// A counter is kept as a decimal number, as wasmtime's own store keeps it; nothing counts as 0.
    async fn increment(&mut self, _: Resource<Bucket>, key: String, delta: u64) -> Result<u64, Error> {
        let number = |value: &Bytes| {
            let text = std::str::from_utf8(value).ok();
            text.and_then(|text| text.parse::<u64>().ok()).ok_or_else(|| other(format_args!("{key:?} holds no number")))
        };
        let Grants { keyvalue, usage, .. } = &*self.grants;
        let sum = keyvalue.change(&key, |old| {
            let old = old.map_or(Ok(0), number)?;
            let sum = old.checked_add(delta).ok_or_else(|| other(format_args!("{key:?} would exceed 64 bits")))?;
            Ok(Some(sum.to_string().into()))
        });
        number(&usage.keyvalue("increment", sum).await?)
    }
}

impl claims::Host for State {
    async fn claim(&mut self, _: Resource<Bucket>, key: String, value: Vec<u8>) -> Result<Vec<u8>, Error> {
        let value = Bytes::from(value);
        let Grants { keyvalue, usage, .. } = &*self.grants;
        let winner = keyvalue.change(&key, |old| Ok(old.is_none().then(|| value.clone())));
        usage.keyvalue("claim", winner).await.map(Vec::from)
    }
}
