//! Header blocks as NATS carries them (ADR-4): a version line, then lines of names and values.

use async_nats::header::{HeaderName, HeaderValue};
use async_nats::{HeaderMap, StatusCode};

/// What async-nats fails at in a block; nothing, if it can read it. An empty block is none.
pub fn fault(block: &[u8]) -> Option<&'static str> {
    if block.is_empty() {
        return None;
    }
    let Ok(text) = std::str::from_utf8(block) else { return Some("its headers are no UTF-8") };
    let mut lines = text.lines();
    let Some(status) = lines.next().and_then(|version| version.strip_prefix("NATS/1.0")).map(str::trim) else {
        return Some("its headers do not begin with NATS/1.0");
    };
    let code = status.split_once(' ').map_or(status, |(code, _)| code.trim());
    if !code.is_empty() && code.parse::<StatusCode>().is_err() {
        return Some("its headers begin with a status that is none");
    }
    headers(lines).into_iter().find_map(Result::err)
}

/// Those of a block's headers that can be read.
pub fn readable(block: &[u8]) -> HeaderMap {
    let lines = block.split(|byte| *byte == b'\n').skip(1);
    let lines = lines.filter_map(|line| std::str::from_utf8(line.strip_suffix(b"\r").unwrap_or(line)).ok());
    let mut readable = HeaderMap::new();
    for (name, value) in headers(lines).into_iter().flatten() {
        readable.append(name, value);
    }
    readable
}

/// Reads header lines as async-nats does, and goes on where it gives up or panics.
fn headers<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<Result<(HeaderName, HeaderValue), &'static str>> {
    let mut lines = lines.peekable();
    let mut headers = Vec::new();
    while let Some(line) = lines.next() {
        if line.is_empty() {
            continue;
        }
        let Some((name, value)) = line.split_once(':') else {
            headers.push(Err("a line of its headers has no colon"));
            continue;
        };
        let mut value = value.trim_start().to_owned();
        while let Some(more) = lines.next_if(|line| line.starts_with(char::is_whitespace)) {
            value.push_str(more);
        }
        let value = value.trim_end().parse().map_err(|_| "a header's value has a carriage return in it");
        let name = name.parse().map_err(|_| "a header's name has a character in it that names must not have");
        headers.push(name.and_then(|name| Ok((name, value?))));
    }
    headers
}

/// The block of these headers.
pub fn block_of(headers: &HeaderMap) -> Vec<u8> {
    let mut block = b"NATS/1.0\r\n".to_vec();
    for (name, values) in headers.iter() {
        for value in values {
            block.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
        }
    }
    block.extend_from_slice(b"\r\n");
    block
}

/// How long the block of these headers is.
pub fn block_bytes(headers: &HeaderMap) -> usize {
    let lines = headers.iter().flat_map(|(name, values)| {
        let name: &str = name.as_ref();
        values.iter().map(|value| name.len() + value.as_str().len() + ": \r\n".len())
    });
    "NATS/1.0\r\n\r\n".len() + lines.sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_as_long_as_it_is_said_to_be() {
        let mut headers = HeaderMap::new();
        for (name, value) in [("A", "1"), ("A", ""), ("Bcd", "é")] {
            assert_eq!(block_bytes(&headers), block_of(&headers).len());
            headers.append(name, value);
        }
        assert_eq!(block_bytes(&headers), block_of(&headers).len());
    }
}

#[cfg(test)]
mod fuzz {
    use super::*;
    use ::fuzz::{Strategy, any, check, collection, mutated, prop_oneof};

    fn block(headers: &[(String, String)]) -> (HeaderMap, Vec<u8>) {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let name: HeaderName = name.parse().expect("a name");
            map.append(name, value.trim().parse::<HeaderValue>().expect("a value"));
        }
        let block = block_of(&map);
        (map, block)
    }

    fn headers() -> impl Strategy<Value = Vec<(String, String)>> {
        collection::vec(("[!-9;-~]{1,12}", "\\PC{0,20}"), 0..8)
    }

    /// Headers that are written as a block are read again as they were, and the block is as long as was said.
    #[test]
    fn a_block_gives_back_its_headers() {
        check("headers through a block", 4_000, headers(), |headers| {
            let (map, block) = block(&headers);
            assert_eq!(fault(&block), None);
            assert_eq!(readable(&block), map);
            assert_eq!(block_bytes(&map), block.len());
        });
    }

    /// Whatever a sender calls headers is read as far as it can be, and what was read can be written.
    #[test]
    fn any_block_is_read_as_far_as_it_can_be() {
        let changed = headers().prop_flat_map(|headers| mutated(block(&headers).1));
        let bytes = prop_oneof![collection::vec(any::<u8>(), 0..200), changed];
        check("a block of anything", 6_000, bytes, |bytes| {
            let found = readable(&bytes);
            let block = block_of(&found);
            assert_eq!(block_bytes(&found), block.len());
            assert_eq!(fault(&block), None, "what was read cannot be read again: {found:?}");
            // Blanks around a value do not survive; a folded one may begin with some.
            let trimmed = |headers: &HeaderMap| -> Vec<(String, Vec<String>)> {
                let trimmed = headers.iter().map(|(name, values)| {
                    (name.to_string(), values.iter().map(|value| value.as_str().trim().to_owned()).collect())
                });
                let mut trimmed: Vec<_> = trimmed.collect();
                trimmed.sort();
                trimmed
            };
            assert_eq!(trimmed(&readable(&block)), trimmed(&found));
            let _ = fault(&bytes);
        });
    }
}
