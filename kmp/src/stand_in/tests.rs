use proptest::prelude::*;

use super::*;

fn control() -> Control {
    Control {
        state: State::Panicked,
        instance: 700,
        incarnation: 9,
        nonce: 0x1234,
        stamp_ns: 5,
        start_ticks: 77,
        pid: 4321,
        text: "Fatal exception".into(),
        beats: vec![1, u64::MAX, 3],
    }
}

/// Change a byte and make the checksum right again, as a liar would.
fn lie(at: usize, value: u8) -> Vec<u8> {
    let mut bytes = control().encode();
    bytes[at] = value;
    bytes[20..24].fill(0);
    let crc = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC).checksum(&bytes);
    bytes[20..24].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn control_and_notice_come_back() {
    let c = control();
    assert_eq!(Control::decode(&c.encode()).unwrap(), c);
    let n = Notice {
        kind: NoticeKind::Parked,
        instance: 3,
        incarnation: 1,
        stamp_ns: 8,
        text: "reboot: Power down".into(),
    };
    assert_eq!(Notice::decode(&n.encode()).unwrap(), n);
}

#[test]
fn every_lie_of_a_control_file_has_its_own_words() {
    let text = |bytes: &[u8]| Control::decode(bytes).unwrap_err().to_string();
    assert_eq!(Control::decode(&[]), Err(ControlError::Empty));
    assert!(text(&[1; 30]).contains("30 bytes"));
    assert!(text(&vec![0; 1 << 16]).contains("65536 bytes"));
    assert!(text(&lie(0, 0)).contains("magic"));
    assert!(text(&lie(8, 7)).contains("layout 7"));
    assert!(text(&lie(12, 9)).contains("state word is 9"));
    assert!(text(&lie(18, 0)).contains("0 CPUs"));
    assert!(text(&lie(18, 65)).contains("65 CPUs"));
    assert!(text(&lie(60, 129)).contains("129 bytes"));
    assert!(text(&lie(59, 0x80)).contains("process id"));
    let mut zero = control();
    zero.nonce = 0;
    assert!(text(&zero.encode()).contains("nonce"));
    let mut torn = control().encode();
    torn[210] ^= 1;
    assert_eq!(Control::decode(&torn), Err(ControlError::Torn));
}

#[test]
fn texts_are_cut_and_cleaned() {
    let long = Control { text: "é".repeat(100), ..control() };
    assert_eq!(Control::decode(&long.encode()).unwrap().text, "é".repeat(64));
    let odd = Control { text: "a\x1b[2J\nb".into(), ..control() };
    assert_eq!(Control::decode(&odd.encode()).unwrap().text, "a [2J b");
    // Bytes that are no UTF-8 come out as replacement characters.
    assert!(Control::decode(&lie(80, 0xff)).unwrap().text.starts_with('\u{fffd}'));
}

#[test]
fn log_lines() {
    assert_eq!(log_line(3, 12, "a\nb"), "3,12;a b\n");
    assert_eq!(parse_log_line("3,12;a;b"), Some((3, 12, "a;b")));
    for odd in ["", "x", "8,1;t", "1;t", ",;", "thread 'main' panicked at x:1, 2; y"] {
        assert_eq!(parse_log_line(odd), None, "{odd}");
    }
}

proptest! {
    #[test]
    fn garbage_never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..900), magic: bool) {
        if magic && bytes.len() > 12 {
            bytes[..12].copy_from_slice(&control().encode()[..12]);
        }
        let _ = Control::decode(&bytes);
        let _ = Notice::decode(&bytes);
    }

    #[test]
    fn a_lying_byte_never_panics(at in 0usize..232, value: u8) {
        if let Ok(c) = Control::decode(&lie(at, value)) {
            prop_assert_eq!(c.beats.len(), 3);
            prop_assert!(c.nonce != 0 && c.pid != 0);
        }
    }
}
