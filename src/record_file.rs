//! The file of a recorded working set: `docs/record-format.md`, byte by byte.
//!
//! The reader trusts no field: it allocates only for bytes that have really come, and checks them all before it uses
//! any.

use std::ops::Range;

use rustix::io::Errno;

use crate::abi::KUF_RECORD_VERSION;
use crate::alloc::{refusable, zeroes};
use crate::error::{words, Error, Result, Words};

/// Runs in one recording, at most: a gigabyte in memory and in the file.
pub const MAX_RUNS: u64 = 1 << 26;

const MAGIC: [u8; 8] = *b"\x89KUFREC\n";
/// The part that every version has: the magic, the version, the length of the header.
const PREFIX: usize = 16;
pub const HEADER: usize = 48;
/// A later header may be longer; a reader may skip its additional fields.
const MAX_HEADER: usize = 4096;
/// No page is smaller. So an address in units leaves twelve bits unused, and a step of either sign fits.
const MIN_UNIT: u64 = 4096;
/// Bytes of a checksum.
pub const SUM: usize = 4;
/// Bytes of the shortest entry and of the longest.
const ENTRY: Range<u64> = 2..20;
/// Bytes to read at a time, which limits the memory that a hostile length can make us allocate.
const PIECE: usize = 1 << 20;

/// Neighbouring units that were demanded one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Guest physical address, in units.
    pub first: u64,
    pub units: u64,
}

/// A file that was checked: all its runs can be read.
pub struct Recording {
    unit: u64,
    count: u64,
    entries: Vec<u8>,
}

/// Encodes `runs` of `unit` bytes as a file. Err: there is no memory for it.
pub fn encode(unit: u64, runs: &[Run]) -> Result<Vec<u8>> {
    let mut length = 0;
    each_entry(runs, |step, more| length += varint_len(step) + varint_len(more));
    let mut file = Vec::new();
    refusable(|| file.try_reserve_exact(HEADER + length + SUM)).map_err(|_| no_memory(length as u64))?;
    file.extend(MAGIC);
    file.extend(KUF_RECORD_VERSION.to_le_bytes());
    file.extend((HEADER as u32).to_le_bytes());
    file.extend(unit.to_le_bytes());
    file.extend((runs.len() as u64).to_le_bytes());
    file.extend((length as u64).to_le_bytes());
    file.extend(0_u32.to_le_bytes());
    file.extend(crc32fast::hash(&file).to_le_bytes());
    each_entry(runs, |step, more| {
        put_varint(&mut file, step);
        put_varint(&mut file, more);
    });
    file.extend(crc32fast::hash(&file).to_le_bytes());
    Ok(file)
}

impl Recording {
    /// Reads one file through `read`, which fills a buffer as far as there are bytes. Reads no byte after the file.
    pub fn read(mut read: impl FnMut(&mut [u8]) -> Result<usize>) -> Result<Self> {
        let mut header = zeroes(MAX_HEADER)?;
        header.truncate(PREFIX);
        let got = read(&mut header)?;
        if got == 0 || header[..got.min(MAGIC.len())] != MAGIC[..got.min(MAGIC.len())] {
            return Err(Error::new(Errno::INVAL, "fd holds no recording: its first bytes are not those of one"));
        }
        if got < PREFIX {
            return Err(short());
        }
        let version = u32_at(&header, 8);
        if version > KUF_RECORD_VERSION {
            return Err(unsupported(words!("version {version} (this library reads up to {KUF_RECORD_VERSION})")));
        }
        let length = u32_at(&header, 12) as usize;
        if version == 0 || !(HEADER..=MAX_HEADER).contains(&length) {
            return Err(damaged("version and header length contradict each other"));
        }
        header.resize(length, 0);
        if read(&mut header[PREFIX..])? < length - PREFIX {
            return Err(short());
        }
        if u32_at(&header, length - SUM) != crc32fast::hash(&header[..length - SUM]) {
            return Err(damaged("the header's checksum is wrong"));
        }
        let (unit, count, length) = (u64_at(&header, 16), u64_at(&header, 24), u64_at(&header, 32));
        if u32_at(&header, 40) != 0 {
            return Err(unsupported("features that this library does not know".into()));
        }
        if !unit.is_power_of_two() || unit < MIN_UNIT {
            return Err(damaged("the unit is no page size"));
        }
        if count > MAX_RUNS {
            return Err(Error::new(Errno::FBIG, words!("the recording has {count} runs: at most {MAX_RUNS}")));
        }
        if !(count * ENTRY.start..=count * ENTRY.end).contains(&length) {
            return Err(damaged("the length of the entries does not fit the number of runs"));
        }
        let entries = read_whole(&mut read, length)?;
        let mut sum = [0; SUM];
        if read(&mut sum)? < SUM {
            return Err(short());
        }
        let mut hash = crc32fast::Hasher::new();
        hash.update(&header);
        hash.update(&entries);
        if u32::from_le_bytes(sum) != hash.finalize() {
            return Err(damaged("the checksum is wrong"));
        }
        let recording = Self { unit, count, entries };
        recording.check()?;
        Ok(recording)
    }

    /// The runs as guest physical byte ranges, in the order in which they were demanded.
    pub fn runs(&self) -> Runs<'_> {
        Runs { unit: self.unit, left: &self.entries, end: 0 }
    }

    /// Bytes of a unit.
    #[cfg(any(test, fuzzing))]
    pub fn unit(&self) -> u64 {
        self.unit
    }

    /// Number of runs.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Checks every entry: a valid checksum does not make a valid file.
    fn check(&self) -> Result<()> {
        let mut runs = self.runs();
        for _ in 0..self.count {
            runs.next().ok_or_else(|| damaged("a run outside the address space"))?;
        }
        if !runs.left.is_empty() {
            return Err(damaged("more runs than the header says"));
        }
        Ok(())
    }
}

/// Returns `bytes` with valid checksums, so that a test reaches the checks after them.
#[cfg(any(test, fuzzing))]
pub fn with_checksums(bytes: &[u8]) -> Vec<u8> {
    let mut file = bytes.to_vec();
    let header = if file.len() < PREFIX { 0 } else { u32_at(&file, 12) as usize };
    for end in [header, file.len()] {
        if (SUM..=file.len()).contains(&end) {
            let sum = crc32fast::hash(&file[..end - SUM]);
            file[end - SUM..end].copy_from_slice(&sum.to_le_bytes());
        }
    }
    file
}

/// An iterator over the runs of a [`Recording`]. It ends at an entry that is not valid.
pub struct Runs<'a> {
    unit: u64,
    left: &'a [u8],
    /// The end of the last run, in units.
    end: u64,
}

impl Iterator for Runs<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let first = self.end.checked_add_signed(unfold(varint(&mut self.left)?))?;
        let units = varint(&mut self.left)?.checked_add(1)?;
        self.end = first.checked_add(units)?;
        Some(first.checked_mul(self.unit)?..self.end.checked_mul(self.unit)?)
    }
}

/// Passes the two numbers of each entry of `runs`: the step from the end of the run before, and the units after the
/// first.
fn each_entry(runs: &[Run], mut entry: impl FnMut(u64, u64)) {
    let mut end = 0_u64;
    for run in runs {
        entry(fold(run.first.wrapping_sub(end) as i64), run.units - 1);
        end = run.first + run.units;
    }
}

/// Maps small numbers of either sign to small unsigned numbers.
fn fold(step: i64) -> u64 {
    ((step << 1) ^ (step >> 63)) as u64
}

fn unfold(folded: u64) -> i64 {
    (folded >> 1) as i64 ^ -((folded & 1) as i64)
}

fn varint_len(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

fn put_varint(to: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        to.push(value as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}

/// Takes a number off the front. None: there is none, it is too large, or it is not in its shortest form.
fn varint(from: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = from.split_first()?;
        *from = rest;
        let bits = u64::from(byte & 0x7f);
        if shift == 63 && bits > 1 {
            return None;
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return (bits != 0 || shift == 0).then_some(value);
        }
    }
    None
}

fn read_whole(read: &mut impl FnMut(&mut [u8]) -> Result<usize>, length: u64) -> Result<Vec<u8>> {
    let mut bytes: Vec<u8> = Vec::new();
    while (bytes.len() as u64) < length {
        let at = bytes.len();
        let piece = (length - at as u64).min(PIECE as u64) as usize;
        refusable(|| bytes.try_reserve(piece)).map_err(|_| no_memory(length))?;
        bytes.resize(at + piece, 0);
        if read(&mut bytes[at..])? < piece {
            return Err(short());
        }
    }
    Ok(bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].iter().take(4).rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

fn damaged(what: &str) -> Error {
    Error::new(Errno::BADMSG, words!("the recording is damaged: {what}"))
}

fn short() -> Error {
    damaged("it ends early")
}

fn unsupported(what: Words) -> Error {
    Error::new(Errno::PROTONOSUPPORT, words!("the recording has {what}: it needs a newer library"))
}

fn no_memory(bytes: u64) -> Error {
    Error::new(Errno::NOMEM, words!("no memory for a recording of {bytes} bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u64 = 4096;

    fn run(first: u64, units: u64) -> Run {
        Run { first, units }
    }

    fn decode(file: &[u8]) -> Result<Recording> {
        let mut left = file;
        Recording::read(|buffer| {
            let n = buffer.len().min(left.len());
            buffer[..n].copy_from_slice(&left[..n]);
            left = &left[n..];
            Ok(n)
        })
    }

    fn refused(file: &[u8]) -> Errno {
        decode(file).err().expect("a bad file is refused").errno()
    }

    /// Builds a file of these entries as `encode` does, with header fields that `change` modifies.
    fn forged(count: u64, entries: &[u8], change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
        let mut file = encode(UNIT, &[]).expect("memory");
        file.truncate(HEADER - SUM);
        file[24..32].copy_from_slice(&count.to_le_bytes());
        file[32..40].copy_from_slice(&(entries.len() as u64).to_le_bytes());
        change(&mut file);
        file.extend(crc32fast::hash(&file).to_le_bytes());
        file.extend(entries);
        file.extend(crc32fast::hash(&file).to_le_bytes());
        file
    }

    fn sample() -> Vec<u8> {
        encode(UNIT, &[run(0x10_0000, 1), run(3, 16), run(0, 3), run(u64::MAX / UNIT - 5, 5)]).expect("memory")
    }

    #[test]
    fn a_written_recording_is_read_back() {
        let mut random = crate::testing::random();
        for unit in [4096, 65536, 1 << 30] {
            let end = u64::MAX / unit;
            let mut runs = vec![run(0, 1), run(end - 1, 1), run(0, end), run(end - 200, 200)];
            runs.extend((0..1000).map(|_| run(random(end - 300), 1 + random(300))));
            let file = encode(unit, &runs).expect("memory");
            let recording = decode(&file).expect("a good file");
            assert_eq!(recording.count(), runs.len() as u64);
            let expected: Vec<_> = runs.iter().map(|r| r.first * unit..(r.first + r.units) * unit).collect();
            assert_eq!(recording.runs().collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn the_encoding_is_that_of_the_document() {
        let file = encode(UNIT, &[run(0x100, 1), run(0x102, 16), run(0xf0, 2)]).expect("memory");
        let hex: Vec<String> = file.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = include_str!("../docs/record-format.md");
        let dump: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("    ")?.split_once(": "))
            .flat_map(|(_, bytes)| bytes.split_ascii_whitespace().take_while(|word| *word != "|"))
            .collect();
        assert_eq!(dump, hex);
    }

    #[test]
    fn an_empty_recording_is_valid() {
        let recording = decode(&encode(UNIT, &[]).expect("memory")).expect("a good file");
        assert_eq!((recording.count(), recording.runs().next()), (0, None));
    }

    #[test]
    fn every_truncation_is_refused_and_bytes_after_the_file_are_not_read() {
        let file = sample();
        assert_eq!(refused(&[]), Errno::INVAL);
        for length in 1..file.len() {
            assert_eq!(refused(&file[..length]), Errno::BADMSG, "{length} bytes");
        }
        let mut longer = file.clone();
        longer.extend([1; 100]);
        assert_eq!(decode(&longer).expect("a good file").count(), 4);
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let file = sample();
        for bit in 0..file.len() * 8 {
            let mut bad = file.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let errno = refused(&bad);
            let expected = match bit / 8 {
                0..8 => Errno::INVAL,
                8..12 if bad[8..12] != [0; 4] => Errno::PROTONOSUPPORT,
                _ => Errno::BADMSG,
            };
            assert_eq!(errno, expected, "bit {bit}");
        }
    }

    #[test]
    fn unknown_versions_and_features_are_refused() {
        let good = forged(1, &[0, 0], |_| {});
        assert_eq!(decode(&good).expect("a good file").runs().next(), Some(0..UNIT));
        assert_eq!(refused(&forged(1, &[0, 0], |file| file[8] = 2)), Errno::PROTONOSUPPORT);
        assert_eq!(refused(&forged(1, &[0, 0], |file| file[8] = 0)), Errno::BADMSG);
        assert_eq!(refused(&forged(1, &[0, 0], |file| file[40] = 1)), Errno::PROTONOSUPPORT);
        // A reader skips the additional fields of a longer header of this version.
        let longer = forged(1, &[0, 0], |file| {
            file[12] += 8;
            file.extend([7; 8]);
        });
        assert_eq!(decode(&longer).expect("a good file").count(), 1);
        assert_eq!(refused(&forged(1, &[0, 0], |file| file[12] -= 4)), Errno::BADMSG);
        assert_eq!(refused(&forged(1, &[0, 0], |file| file[15] = 0xff)), Errno::BADMSG);
    }

    #[test]
    fn bad_entries_under_a_good_checksum_are_refused() {
        let max = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
        let bad = |count, entries: &[u8]| refused(&forged(count, entries, |_| {}));
        assert_eq!(bad(1, &[1, 0]), Errno::BADMSG, "before the first address");
        assert_eq!(bad(1, &[&max[..], &[0]].concat()), Errno::BADMSG, "far before it");
        assert_eq!(bad(1, &[&[0][..], &max].concat()), Errno::BADMSG, "2^64 units");
        assert_eq!(bad(1, &[0, 0x80, 0]), Errno::BADMSG, "a number that could be shorter");
        assert_eq!(bad(1, &[0, 0x80, 0x80]), Errno::BADMSG, "a number that does not end");
        assert_eq!(bad(1, &[&[0][..], &[0xff; 12]].concat()), Errno::BADMSG, "a number that is too long");
        assert_eq!(bad(2, &[0, 0, 0]), Errno::BADMSG, "half a run");
        assert_eq!(bad(1, &[0, 0, 0, 0]), Errno::BADMSG, "a run too many");
        assert_eq!(bad(2, &[0, 0x80, 0x80, 1]), Errno::BADMSG, "a run too few");
        for unit in [0_u64, 2048, 4097] {
            let file = forged(1, &[0, 0], |file| file[16..24].copy_from_slice(&unit.to_le_bytes()));
            assert_eq!(refused(&file), Errno::BADMSG, "a unit of {unit}");
        }
        // This address fits 64 bits in units and not in bytes.
        let file = forged(1, &[0x80, 0x80, 4, 0], |file| file[16..24].copy_from_slice(&(1_u64 << 60).to_le_bytes()));
        assert_eq!(refused(&file), Errno::BADMSG);
    }

    #[test]
    fn false_lengths_take_no_memory() {
        let lie = |count: u64, length: u64| {
            let file = forged(count, &[], |file| file[32..40].copy_from_slice(&length.to_le_bytes()));
            let mut largest = 0;
            let mut left = file.as_slice();
            let result = Recording::read(|buffer| {
                largest = largest.max(buffer.len());
                let n = buffer.len().min(left.len());
                buffer[..n].copy_from_slice(&left[..n]);
                left = &left[n..];
                Ok(n)
            });
            assert!(largest <= PIECE);
            result.err().expect("refused").errno()
        };
        assert_eq!(lie(u64::MAX, u64::MAX), Errno::FBIG);
        assert_eq!(lie(MAX_RUNS + 1, 2 * MAX_RUNS + 2), Errno::FBIG);
        assert_eq!(lie(MAX_RUNS, u64::MAX), Errno::BADMSG);
        assert_eq!(lie(MAX_RUNS, 1), Errno::BADMSG);
        assert_eq!(lie(MAX_RUNS, 2 * MAX_RUNS), Errno::BADMSG);
    }
}
