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
