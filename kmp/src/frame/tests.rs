use bytes::BytesMut;
use proptest::prelude::*;

use super::*;
use crate::message::{Blob, Bye, HeartbeatReq, HeartbeatRsp, Message, Role, VmcoreData};
use crate::version::Versions;

fn encoded(message: &Message, sequence: u32) -> Vec<u8> {
    let mut out = BytesMut::new();
    Encoder::new(Role::Bulk).encode(message, sequence, 77, &mut out).unwrap();
    out.to_vec()
}

fn all(decoder: &mut Decoder, mut input: &[u8]) -> Result<Vec<Frame>, FrameError> {
    let mut frames = Vec::new();
    while let Some(f) = decoder.feed(&mut input)? {
        frames.push(f);
    }
    assert!(input.is_empty());
    Ok(frames)
}

fn sample() -> Message {
    Message::HeartbeatReq(HeartbeatReq { metrics: true, ..HeartbeatReq::default() })
}

/// Recompute the checksum of a frame whose header was changed.
fn reseal(frame: &mut [u8]) {
    let mut header = [0; HEADER_LEN];
    header.copy_from_slice(&frame[..HEADER_LEN]);
    let crc = checksum(&header, &frame[HEADER_LEN..]);
    frame[CRC_AT].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn checksum_is_crc32_iso_hdlc_with_its_own_field_zero() {
    assert_eq!(CRC.checksum(b"123456789"), 0xCBF4_3926, "check value of the catalogue");
    let frame = encoded(&sample(), 9);
    let mut zeroed = frame.clone();
    zeroed[24..28].fill(0);
    assert_eq!(frame[24..28], CRC.checksum(&zeroed).to_le_bytes());
}

#[test]
fn golden_heartbeat_request() {
    // Header fields by hand; payload {"metrics": true}: fixmap 1, fixstr 7, true.
    let mut want = Vec::from(*b"\x00\x50\x4d\x4b\x01\x00\x01\x01\x09\x00\x00\x00\x0a\x00\x00\x00");
    want.extend_from_slice(b"\x4d\x00\x00\x00\x00\x00\x00\x00");
    let tail = *b"\x00\x00\x00\x00\x81\xa7metrics\xc3";
    // Computed with Python's zlib.crc32.
    want.extend_from_slice(&0x7830_C3CDu32.to_le_bytes());
    want.extend_from_slice(&tail);
    assert_eq!(encoded(&sample(), 9), want);
}

#[test]
fn frames_survive_any_split() {
    let mut bytes = encoded(&sample(), 1);
    bytes.extend(encoded(&Message::Bye(Bye::default()), 2));
    bytes.extend(encoded(&Message::HeartbeatRsp(HeartbeatRsp { incarnation: 3, ..Default::default() }), 3));
    let whole = all(&mut Decoder::new(Role::Control), &bytes).unwrap();
    assert_eq!(whole.len(), 3);
    for size in 1..bytes.len() {
        let mut d = Decoder::new(Role::Control);
        let pieces: Vec<Frame> = bytes.chunks(size).flat_map(|c| all(&mut d, c).unwrap()).collect();
        assert_eq!(pieces, whole, "pieces of {size}");
    }
}

#[test]
fn errors_name_what_was_found_and_what_was_expected() {
    let good = encoded(&sample(), 5);
    let d = || Decoder::new(Role::Control);

    let mut bad = good.clone();
    bad[0] = 0x7f;
    assert_eq!(all(&mut d(), &bad).unwrap_err(), FrameError::Magic { found: 0x4B4D_507F });

    let mut bad = good.clone();
    bad[4] = 9;
    let e = all(&mut d(), &bad).unwrap_err();
    assert_eq!(e, FrameError::Version { found: 9, expected: Versions::OURS });
    assert_eq!(e.to_string(), "frame has KMP version 9, expected 1");

    let mut bad = good.clone();
    bad[12..16].copy_from_slice(&((CONTROL_LIMIT - HEADER_LEN + 1) as u32).to_le_bytes());
    let e = all(&mut d(), &bad).unwrap_err();
    assert_eq!(e, FrameError::TooLong { msg_type: 0x0101, found: 65505, limit: 65536 });

    let mut bad = good.clone();
    bad[32] ^= 1;
    assert!(matches!(all(&mut d(), &bad).unwrap_err(), FrameError::Checksum { sequence: 5, .. }));
}

#[test]
fn after_an_error_the_decoder_refuses_good_frames() {
    let mut d = Decoder::new(Role::Control);
    assert!(d.feed(&mut &[0xff; 32][..]).is_err());
    assert_eq!(d.feed(&mut &encoded(&sample(), 1)[..]), Err(FrameError::Poisoned));
}

#[test]
fn a_hello_of_any_version_is_read_so_that_it_can_be_refused_in_words() {
    let mut bytes = encoded(&Message::Hello(Default::default()), 1);
    bytes[4] = 200;
    reseal(&mut bytes);
    let frames = all(&mut Decoder::new(Role::Control), &bytes).unwrap();
    assert_eq!(frames[0].header.version, 200);
}

#[test]
fn reserved_word_is_ignored_but_covered_by_the_checksum() {
    let mut bytes = encoded(&sample(), 1);
    bytes[28] = 0xaa;
    assert!(matches!(all(&mut Decoder::new(Role::Control), &bytes), Err(FrameError::Checksum { .. })));
    reseal(&mut bytes);
    assert_eq!(all(&mut Decoder::new(Role::Control), &bytes).unwrap().len(), 1);
}

#[test]
fn limits_are_exact_for_both_roles() {
    for role in [Role::Control, Role::Bulk] {
        let piece =
            |n: usize| Message::VmcoreData(VmcoreData { data: Blob::from(vec![7; n]), ..Default::default() });
        let mut out = BytesMut::new();
        Encoder::new(role).encode(&piece(40_000), 1, 0, &mut out).unwrap();
        let overhead = out.len() - 40_000;
        // bin 16 has a 3-byte prefix, bin 32 a 5-byte one.
        let fits = role.frame_limit() - overhead - if role == Role::Bulk { 2 } else { 0 };
        out.clear();
        Encoder::new(role).encode(&piece(fits), 1, 0, &mut out).unwrap();
        assert_eq!(out.len(), role.frame_limit());
        assert_eq!(all(&mut Decoder::new(role), &out).unwrap().len(), 1);
        let before = out.clone();
        let e = Encoder::new(role).encode(&piece(fits + 1), 1, 0, &mut out).unwrap_err();
        assert!(matches!(e, EncodeError::TooLong { len, limit, .. } if len == limit + 1), "{e}");
        assert_eq!(out, before, "a refused message leaves nothing behind");
    }
}

#[test]
fn a_control_decoder_refuses_bulk_frames_before_it_makes_room() {
    let frame = encoded(
        &Message::VmcoreData(VmcoreData { data: Blob::from(vec![1; 70_000]), ..Default::default() }),
        1,
    );
    let mut d = Decoder::new(Role::Control);
    let mut input = &frame[..];
    assert!(matches!(d.feed(&mut input), Err(FrameError::TooLong { .. })));
    assert_eq!(d.buffered(), HEADER_LEN);
}

proptest! {
    #[test]
    fn garbage_never_panics_nor_fills_memory(bytes in prop::collection::vec(any::<u8>(), 0..4096), magic: bool, cut in 1usize..64) {
        let mut bytes = bytes;
        if magic && bytes.len() > 8 {
            bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
            bytes[4..6].copy_from_slice(&1u16.to_le_bytes());
        }
        let mut d = Decoder::new(Role::Control);
        let mut failed = false;
        for chunk in bytes.chunks(cut) {
            let mut input = chunk;
            loop {
                match d.feed(&mut input) {
                    Ok(Some(_)) => prop_assert!(!failed),
                    Ok(None) => { prop_assert!(!failed); break; }
                    Err(_) => { failed = true; break; }
                }
            }
            prop_assert!(d.buffered() <= CONTROL_LIMIT);
            prop_assert!(d.buf.capacity() <= 2 * CONTROL_LIMIT);
        }
    }

    #[test]
    fn one_changed_bit_is_always_noticed(bit in 0usize..(42 * 8), sequence: u32) {
        let mut frame = encoded(&sample(), sequence);
        prop_assert_eq!(frame.len(), 42);
        frame[bit / 8] ^= 1 << (bit % 8);
        // A longer length only waits for more bytes; everything else is an error at once.
        if let Ok(frames) = all(&mut Decoder::new(Role::Control), &frame) {
            prop_assert!(frames.is_empty() && (96..128).contains(&bit));
        }
    }

    #[test]
    fn truncated_frames_wait(cut in 0usize..42) {
        let frame = encoded(&sample(), 1);
        prop_assert_eq!(all(&mut Decoder::new(Role::Control), &frame[..cut]), Ok(vec![]));
    }
}
