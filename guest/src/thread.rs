//! Which mails a mail refers to, as far as its header can be trusted.
//!
//! `References` lists a thread from its first mail to the parent, `In-Reply-To` names the parent. Mail programs break
//! both: they cut the list, put dates or addresses beside the ids, fold lines inside an id, name the mail itself.

use memchr::memchr;

use crate::likeness::mix;
use crate::mail::Mail;

/// So many mails are looked for at most: the parent, some before it, and the first of the thread.
const PARENTS_MAX: usize = 4;

/// The mails that a mail refers to, each as a hash of its Message-ID.
#[derive(Debug, PartialEq, Eq)]
pub struct Thread {
    /// The mail itself; without a Message-ID all its bytes stand for it.
    pub own: u64,
    /// Whether it has a Message-ID.
    pub has_id: bool,
    /// Those before it, the parent first and the first mail of the thread last.
    pub parents: Vec<u64>,
    /// Whether `References` named them, rather than `In-Reply-To` alone.
    pub has_references: bool,
}

impl Thread {
    /// Reads what the header says.
    pub fn read(mail: &Mail<'_>) -> Thread {
        let own_id = ids(mail.fields.message_id).next();
        let own = hash(own_id.unwrap_or(mail.data));
        // Oldest first.
        let mut named: Vec<u64> = Vec::new();
        for id in ids(mail.fields.references).map(hash).filter(|&id| id != own) {
            if !named.contains(&id) {
                if named.len() == PARENTS_MAX {
                    named.remove(1);
                }
                named.push(id);
            }
        }
        let has_references = !named.is_empty();
        if let Some(parent) = ids(mail.fields.in_reply_to).map(hash).find(|&id| id != own)
            && !named.contains(&parent)
        {
            if named.len() == PARENTS_MAX {
                named.remove(1);
            }
            named.push(parent);
        }
        named.reverse();
        Thread { own, has_id: own_id.is_some(), parents: named, has_references }
    }

    /// The mail that the thread began with, as far as this one knows: itself, if it refers to none.
    pub fn root(&self) -> u64 {
        self.parents.last().copied().unwrap_or(self.own)
    }
}

/// The ids in a field, without angle brackets. Without any brackets: the words that look like ids.
fn ids(field: &[u8]) -> impl Iterator<Item = &[u8]> {
    let bracketed = memchr(b'<', field).is_some();
    let mut rest = field;
    std::iter::from_fn(move || {
        loop {
            if bracketed {
                rest = &rest[memchr(b'<', rest)? + 1..];
                let end = memchr(b'>', rest).unwrap_or(rest.len());
                let id = rest[..end].trim_ascii();
                rest = &rest[end..];
                if !id.is_empty() {
                    return Some(id);
                }
            } else {
                rest = rest.trim_ascii_start();
                if rest.is_empty() {
                    return None;
                }
                let end = rest.iter().position(u8::is_ascii_whitespace).unwrap_or(rest.len());
                let word = &rest[..end];
                rest = &rest[end..];
                if memchr(b'@', word).is_some() {
                    return Some(word);
                }
            }
        }
    })
}

/// The 64-bit FNV-1a hash: the same everywhere and for ever, which ids have to be. White space that folding put
/// into an id is left out.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .filter(|byte| !byte.is_ascii_whitespace())
        .fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// A hash of several pieces, each told from the next.
pub(crate) fn hash_all(pieces: &[&[u8]]) -> u64 {
    pieces.iter().fold(0, |sum, piece| mix(sum.rotate_left(17) ^ hash(piece)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(header: &str) -> Thread {
        Thread::read(&Mail::read(header.as_bytes()).expect("a mail"))
    }

    fn parents(header: &str) -> Vec<u64> {
        read(header).parents
    }

    /// The published test vectors; another hash would give every open thread a new id.
    #[test]
    fn hash_is_fnv1a() {
        assert_eq!(hash(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(hash(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(hash(b"foobar"), 0x8594_4171_f739_67e8);
    }

    /// However a mail program writes the thread down, parent and first mail are found.
    #[test]
    fn broken_fields_are_understood() {
        let [a, b, c] = [&b"a@x"[..], b"b@x", b"c@x"].map(hash);
        for (header, expected) in [
            ("References: <a@x> <b@x>\nIn-Reply-To: <b@x>\n\n", vec![b, a]),
            ("References: <a@x>\nIn-Reply-To: <b@x>\n\n", vec![b, a]),
            ("References: <a@x>\n\t<a@\n x>\n <b@x>\n\n", vec![b, a]),
            ("References: a@x b@x\n\n", vec![b, a]),
            ("References: <a@x> <b@x\n\n", vec![b, a]),
            ("In-Reply-To: Your message of Monday <a@x>\n\n", vec![a]),
            ("Message-ID: <c@x>\nReferences: <a@x> <c@x>\nIn-Reply-To: <c@x>\n\n", vec![a]),
            ("Subject: s\nReferences: <> <>\n\n", vec![]),
        ] {
            assert_eq!(parents(header), expected, "{header}");
        }
        assert_eq!(read("Message-ID: <c@x>\n\n").root(), c);
    }

    /// Of a long list the ends count, the parent and the first mail.
    #[test]
    fn long_threads_keep_their_ends() {
        let ids: Vec<String> = (0..500).map(|number| format!("<{number}@x>")).collect();
        let parents = parents(&format!("References: {}\n\n", ids.join("\n ")));
        assert_eq!(parents.len(), PARENTS_MAX);
        assert_eq!((parents[0], parents[PARENTS_MAX - 1]), (hash(b"499@x"), hash(b"0@x")));
    }
}
