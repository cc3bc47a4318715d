# idunno/wire/security.py: certificates of the cluster's own CA, and the TLS contexts made from them.
#
# Rule 1: TLS 1.3 only; both sides verify under the cluster's CA. Host names are not checked (addresses change), nor are
#         dates (boards without a clock): the roster decides who is known, by fingerprint.
# Rule 2: of a signing request only the key is taken, after its proof of possession; the CA decides every name.
# Rule 3: only a node's certificate may serve, so a user who holds a certificate cannot pose as a node.
# Rule 4: what makes or takes apart certificates loads `cryptography.x509` when it is called: a node that starts does neither,
#         and the others would wait a tenth longer until they see it.
from __future__ import annotations

import datetime
import hashlib
import ssl
from typing import TYPE_CHECKING, Final

from idunno.base.errors import InvalidArgument
from idunno.wire.calls import Role

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

PEM_BYTES_MAX: Final = 16 * 1024
"""A request or certificate with a P-256 key has about 1 KiB."""

# A hundred years, fixed, so that no clock is read: nobody here checks them, other programs may.
_NOT_BEFORE: Final = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER: Final = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)

_X509_V_FLAG_NO_CHECK_TIME: Final = 0x200000  # openssl/x509_vfy.h; Python's ssl has no name for it


def make_ca() -> tuple[bytes, bytes]:
    """A new CA: its certificate and its private key, both PEM. Keep the key at mode 0600."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "idunno cluster CA")])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _private_pem(key)


def make_key_and_csr(common_name: str) -> tuple[bytes, bytes]:
    """A new private key and a request to certify it, both PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(common_name)).sign(key, hashes.SHA256())
    return _private_pem(key), request.public_bytes(serialization.Encoding.PEM)


def sign(ca_cert_pem: bytes, ca_key_pem: bytes, csr_pem: bytes, *, common_name: str, role: Role) -> bytes:
    """A certificate (PEM) for the key in `csr_pem`, naming `common_name` and, as organizational unit, the role.

    Raises InvalidArgument for a request that is malformed, unproven or holds another kind of key than P-256.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    request = _load_csr(csr_pem)
    ca = x509.load_pem_x509_certificate(ca_cert_pem)
    ca_key = serialization.load_pem_private_key(ca_key_pem, None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey), "the CA's key is made by make_ca"
    subject = x509.Name([*_name(common_name), x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role.value)])
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role is Role.NODE:
        purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(ca.subject)
        .public_key(request.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def is_key_of(cert_pem: bytes, key_pem: bytes) -> bool:
    """Whether this private key belongs to the certificate."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_private_key(key_pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return key.public_key() == x509.load_pem_x509_certificate(cert_pem).public_key()


def sign_statement(key_pem: bytes, statement: bytes) -> bytes:
    """A signature (ECDSA, SHA-256) by a CA's private key."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = serialization.load_pem_private_key(key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey), "the CA's key is made by make_ca"
    return key.sign(statement, ec.ECDSA(hashes.SHA256()))


def is_signed_by(cert_pem: bytes, statement: bytes, signature: bytes) -> bool:
    """Whether the holder of this certificate's key signed the statement."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = x509.load_pem_x509_certificate(cert_pem).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    try:
        key.verify(signature, statement, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def fingerprint(cert_pem_or_der: bytes) -> bytes:
    """SHA-256 of the certificate's DER. Raises InvalidArgument for PEM that holds no certificate."""
    if cert_pem_or_der.lstrip().startswith(b"-----"):
        try:
            cert_pem_or_der = ssl.PEM_cert_to_DER_cert(cert_pem_or_der.decode("ascii"))
        except ValueError as error:
            raise InvalidArgument(f"no certificate: {error}") from None
    return hashlib.sha256(cert_pem_or_der).digest()


def key_fingerprint(csr_pem: bytes) -> bytes:
    """SHA-256 of a request's public key (SPKI, DER): equal when the same key enrols again. Raises InvalidArgument."""
    from cryptography.hazmat.primitives import serialization

    key = _load_csr(csr_pem).public_key()
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).digest()


def server_context(cert_path: str, key_path: str, ca_pem: bytes) -> ssl.SSLContext:
    """For a node's server: shows its certificate, verifies the client's under the CA if it shows one.

    Raises InvalidArgument when the files are no certificate with its key.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, cert_path, key_path, ca_pem)
    context.verify_mode = ssl.CERT_OPTIONAL  # newcomers have none yet; they may call ANYONE's methods only
    context.num_tickets = 0  # no resumption: every connection shows and proves its certificate
    return context


def client_context(cert_path: str | None, key_path: str | None, ca_pem: bytes | None) -> ssl.SSLContext:
    """For connecting to nodes. Without a certificate: anonymous. Without `ca_pem` nobody is verified: only for the first
    Hello, whose answer proves itself by the token. Raises InvalidArgument as server_context does.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, cert_path, key_path, ca_pem)
    context.verify_mode = ssl.CERT_REQUIRED if ca_pem is not None else ssl.CERT_NONE
    return context


def _context(protocol: int, cert_path: str | None, key_path: str | None, ca_pem: bytes | None) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_flags = ssl.VerifyFlags(context.verify_flags | _X509_V_FLAG_NO_CHECK_TIME)
    try:
        if ca_pem is not None:
            context.load_verify_locations(cadata=ca_pem.decode("ascii"))
        if cert_path is not None:
            context.load_cert_chain(cert_path, key_path)
    except (ssl.SSLError, ValueError) as error:
        raise InvalidArgument(f"{cert_path or 'the CA'}: no usable certificate: {error}") from None
    except OSError as error:
        raise InvalidArgument(f"{cert_path} or {key_path}: {error.strerror}; join or log in again") from None
    return context


def _load_csr(csr_pem: bytes) -> x509.CertificateSigningRequest:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec

    if len(csr_pem) > PEM_BYTES_MAX:
        raise InvalidArgument(f"a certificate request of {len(csr_pem)} bytes: at most {PEM_BYTES_MAX}")
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        proven = request.is_signature_valid
        key = request.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidArgument(f"no certificate request: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidArgument("the certificate request holds another kind of key than P-256")
    if not proven:
        raise InvalidArgument("the certificate request is not signed with its own key")
    return request


def _name(common_name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    except ValueError:
        raise InvalidArgument(f"{common_name[:80]!r} cannot stand in a certificate: use 1 to 64 characters") from None


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
